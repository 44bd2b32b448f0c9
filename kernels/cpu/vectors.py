"""Sums of rows with factors, in vectors: reading and updating a state, weighing values.

Each lane is a feature of its own and adds in the order of the rows. A state of the gated delta rule
lies by key features for that, [key_dim, value_dim].
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from specdec.kernels.cpu.decode import address, load_float
from specdec.kernels.cpu.dots import LANES
from specdec.kernels.cpu.exp import fma
from specdec.kernels.cpu.jit import intrinsic, jit

_FLOAT, _INDEX, _WORD = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, LANES)


class _Emitter:
    """Vectors in memory, given by addresses."""

    def __init__(self, builder: Any) -> None:
        self.ir = builder
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        name = f"llvm.fma.v{LANES}f32"
        self.fma = cgutils.get_or_insert_function(builder.module, kind, name)

    def place(self, kind: Any, base: Any, block: int = 0) -> Any:
        there = self.ir.add(base, _INDEX(block * 4 * LANES)) if block else base
        return self.ir.inttoptr(there, kind.as_pointer())

    def load(self, base: Any, block: int) -> Any:
        vector = self.ir.load(self.place(_VECTOR, base, block))
        vector.align = 4
        return vector

    def store(self, value: Any, base: Any, block: int) -> None:
        stored = self.ir.store(value, self.place(_VECTOR, base, block))
        stored.align = 4

    def spread(self, value: Any) -> Any:
        vector = self.ir.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, _WORD(0))
        zeros = ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES)
        return self.ir.shuffle_vector(vector, ir.Constant(_VECTOR, ir.Undefined), zeros)

    def at(self, base: Any, feature: Any) -> Any:
        """The float at an index, in every lane."""
        place = self.ir.add(base, self.ir.mul(feature, _INDEX(4)))
        return self.spread(self.ir.load(self.place(_FLOAT, place)))

    def loop(self, size: Any, start: list[Any], body: Callable[..., list[Any]]) -> list[Any]:
        """Sums over rows, from `start`: body(row, sums) gives the next; at least one row."""
        b = self.ir
        before = b.block
        loop, after = b.append_basic_block("keys"), b.append_basic_block("keys.end")
        b.branch(loop)
        b.position_at_end(loop)
        feature = b.phi(_INDEX)
        feature.add_incoming(_INDEX(0), before)
        phis = [b.phi(_VECTOR) for _ in start]
        added = body(feature, phis)
        following = b.add(feature, _INDEX(1))
        feature.add_incoming(following, loop)
        for phi, first, total in zip(phis, start, added, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(total, loop)
        b.cbranch(b.icmp_signed("<", following, size), loop, after)
        b.position_at_end(after)
        return added


def _reader(blocks: int) -> Callable[..., None]:
    """The intrinsic for `blocks` vectors of value features."""

    @intrinsic
    def read(typing, state, pitch, key, query, size, by_key, by_query):  # type: ignore[no-untyped-def]
        """by_key = S k, by_query = S q: addresses of float32; rows of S are `pitch` bytes apart,
        size: key features."""

        def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
            state, pitch, key, query, size, *outs = args
            emit = _Emitter(builder)

            def body(feature: Any, sums: list[Any]) -> list[Any]:
                factors = [emit.at(key, feature), emit.at(query, feature)]
                row = builder.add(state, builder.mul(feature, pitch))
                added: list[Any] = []
                for block in range(blocks):
                    values = emit.load(row, block)
                    for factor in factors:
                        added.append(builder.call(emit.fma, [values, factor, sums[len(added)]]))
                return added

            totals = emit.loop(size, [ir.Constant(_VECTOR, [0.0] * LANES)] * 2 * blocks, body)
            for index, total in enumerate(totals):
                emit.store(total, outs[index % 2], index // 2)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return read


def _updater(blocks: int) -> Callable[..., None]:
    """The intrinsic for `blocks` vectors of value features."""

    @intrinsic
    def update(typing, source, pitch, decay, key, delta, size, target):  # type: ignore[no-untyped-def]
        """target = decay S + key delta^T; as `read`."""

        def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
            source, pitch, decay, key, delta, size, target = args
            emit = _Emitter(builder)
            fade = emit.spread(decay)
            deltas = [emit.load(delta, block) for block in range(blocks)]

            def body(feature: Any, sums: list[Any]) -> list[Any]:
                factor = emit.at(key, feature)
                skip = builder.mul(feature, pitch)
                row, to = builder.add(source, skip), builder.add(target, skip)
                for block in range(blocks):
                    faded = builder.fmul(emit.load(row, block), fade)
                    emit.store(builder.call(emit.fma, [deltas[block], factor, faded]), to, block)
                return []

            emit.loop(size, [], body)
            return context.get_dummy_value()

        arguments = [types.int64] * 2 + [types.float32] + [types.int64] * 4
        return types.void(*arguments), generate

    return update


def _weigher(blocks: int) -> Callable[..., None]:
    """The intrinsic for `blocks` vectors of features."""

    @intrinsic
    def weigh(typing, values, pitch, weights, size, total):  # type: ignore[no-untyped-def]
        """total += weights . values, `size` rows `pitch` bytes apart."""

        def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
            values, pitch, weights, size, total = args
            emit = _Emitter(builder)

            def body(row: Any, sums: list[Any]) -> list[Any]:
                factor = emit.at(weights, row)
                place = builder.add(values, builder.mul(row, pitch))
                return [
                    builder.call(emit.fma, [emit.load(place, block), factor, sums[block]])
                    for block in range(blocks)
                ]

            start = [emit.load(total, block) for block in range(blocks)]
            for block, vector in enumerate(emit.loop(size, start, body)):
                emit.store(vector, total, block)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return weigh


@intrinsic
def _add_products(typing, a, b, total, blocks):  # type: ignore[no-untyped-def]
    """total += a * b, element by element, for `blocks` vectors."""

    def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
        emit = _Emitter(builder)
        with cgutils.for_range(builder, args[3]) as loop:
            skip = builder.mul(loop.index, _INDEX(4 * LANES))
            places = [builder.add(base, skip) for base in args[:3]]
            values = [emit.load(place, 0) for place in places]
            emit.store(builder.call(emit.fma, values), places[2], 0)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


_weigh1, _weigh4 = _weigher(1), _weigher(4)
_read1, _read4 = _reader(1), _reader(4)
_update1, _update4 = _updater(1), _updater(4)


@jit
def add_products(a, b, total):  # type: ignore[no-untyped-def]
    """total += a * b, element by element; a, b: addresses of as many float32.

    Spelt out, because a compiler that cannot rule out overlaps does not use vectors.
    """
    blocks = len(total) // LANES
    _add_products(a, b, address(total), blocks)
    for i in range(blocks * LANES, len(total)):
        total[i] = fma(load_float(a + 4 * i), load_float(b + 4 * i), total[i])


@jit
def weigh(values, first, weights, start, count, total):  # type: ignore[no-untyped-def]
    """total += weights[start:] . values[first:], `count` of them; values [n, dim], total [dim]."""
    size = len(total)
    pitch = values.strides[0]
    base, w, to = address(values) + first * pitch, address(weights) + 4 * start, address(total)
    done = 0
    if count > 0:
        while done + 4 * LANES <= size:
            _weigh4(base + 4 * done, pitch, w, count, to + 4 * done)
            done += 4 * LANES
        while done + LANES <= size:
            _weigh1(base + 4 * done, pitch, w, count, to + 4 * done)
            done += LANES
    for at in range(count if done < size else 0):
        for i in range(done, size):
            total[i] = fma(weights[start + at], values[first + at, i], total[i])


@jit
def read(state, key, query, by_key, by_query):  # type: ignore[no-untyped-def]
    """by_key = S k and by_query = S q for a state [key_dim, value_dim]."""
    size, values = state.shape
    base, pitch = address(state), state.strides[0]
    k, q, r, y = address(key), address(query), address(by_key), address(by_query)
    done = 0
    while done + 4 * LANES <= values:
        _read4(base + 4 * done, pitch, k, q, size, r + 4 * done, y + 4 * done)
        done += 4 * LANES
    while done + LANES <= values:
        _read1(base + 4 * done, pitch, k, q, size, r + 4 * done, y + 4 * done)
        done += LANES
    for v in range(done, values):
        first, second = np.float32(0), np.float32(0)
        for i in range(size):
            first, second = fma(state[i, v], key[i], first), fma(state[i, v], query[i], second)
        by_key[v], by_query[v] = first, second


@jit
def update(source, decay, key, delta, target):  # type: ignore[no-untyped-def]
    """target = decay S + key delta^T; both [key_dim, value_dim], they may be the same."""
    size, values = source.shape
    base, to, pitch = address(source), address(target), source.strides[0]
    k, d = address(key), address(delta)
    done = 0
    while done + 4 * LANES <= values:
        skip = 4 * done
        _update4(base + skip, pitch, decay, k, d + skip, size, to + skip)
        done += 4 * LANES
    while done + LANES <= values:
        skip = 4 * done
        _update1(base + skip, pitch, decay, k, d + skip, size, to + skip)
        done += LANES
    for i in range(size):
        for v in range(done, values):
            target[i, v] = fma(delta[v], key[i], source[i, v] * decay)
