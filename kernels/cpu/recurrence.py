"""What a state of the gated delta rule is read and updated with, one head at a time.

A state lies by key features, [key_dim, value_dim]: sums over keys then run over whole vectors, each
lane a value feature of its own that adds in the order of the key features.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from specdec.kernels.cpu.decode import address
from specdec.kernels.cpu.dots import LANES
from specdec.kernels.cpu.exp import fma
from specdec.kernels.cpu.jit import inlined

_FLOAT, _INDEX, _WORD = ir.FloatType(), ir.IntType(64), ir.IntType(32)
_VECTOR = ir.VectorType(_FLOAT, LANES)


def _reader(blocks: int) -> Callable[..., None]:
    """The intrinsic for `blocks` vectors of value features."""

    @intrinsic
    def read(typing, state, pitch, key, query, size, by_key, by_query):  # type: ignore[no-untyped-def]
        """by_key = S k, by_query = S q: addresses of float32; rows of S are `pitch` bytes apart,
        size: key features."""

        def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
            state, pitch, key, query, size, *outs = args
            kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
            name = f"llvm.fma.v{LANES}f32"
            add = cgutils.get_or_insert_function(builder.module, kind, name)

            def place(kind: Any, base: Any, index: int = 0) -> Any:
                there = builder.add(base, _INDEX(index * 4 * LANES)) if index else base
                return builder.inttoptr(there, kind.as_pointer())

            def spread(base: Any, at: Any) -> Any:
                value = builder.load(place(_FLOAT, builder.add(base, at)))
                vector = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, _WORD(0))
                zeros = ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES)
                return builder.shuffle_vector(vector, ir.Constant(_VECTOR, ir.Undefined), zeros)

            before = builder.block
            loop, after = (builder.append_basic_block(name) for name in ("read", "read.end"))
            builder.branch(loop)
            builder.position_at_end(loop)
            feature = builder.phi(_INDEX)
            feature.add_incoming(_INDEX(0), before)
            sums = [builder.phi(_VECTOR) for _ in range(2 * blocks)]
            at = builder.mul(feature, _INDEX(4))
            factors = [spread(key, at), spread(query, at)]
            row = builder.add(state, builder.mul(feature, pitch))
            added = []
            for block in range(blocks):
                values = builder.load(place(_VECTOR, row, block))
                values.align = 4
                for which, factor in enumerate(factors):
                    added.append(builder.call(add, [values, factor, sums[2 * block + which]]))
            following = builder.add(feature, _INDEX(1))
            feature.add_incoming(following, loop)
            for phi, total in zip(sums, added, strict=True):
                phi.add_incoming(ir.Constant(_VECTOR, [0.0] * LANES), before)
                phi.add_incoming(total, loop)
            builder.cbranch(builder.icmp_signed("<", following, size), loop, after)
            builder.position_at_end(after)
            for block in range(blocks):
                for which, out in enumerate(outs):
                    stored = builder.store(added[2 * block + which], place(_VECTOR, out, block))
                    stored.align = 4
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return read


_read1, _read4 = _reader(1), _reader(4)


@inlined
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


@inlined
def update(source, decay, key, delta, target):  # type: ignore[no-untyped-def]
    """target = decay S + key delta^T; both [key_dim, value_dim], they may be the same."""
    for i in range(source.shape[0]):
        for v in range(source.shape[1]):
            target[i, v] = fma(delta[v], key[i], source[i, v] * decay)
