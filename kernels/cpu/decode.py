"""Decoding one weight row to float32, and loads from addresses.

Of 4-bit weights every STEP features come as the even ones, then the odd ones: the order in which
dots.py decodes and in which inputs for them are laid out. All others come as they stand.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.np.arrayobj import make_array

from specdec.kernels.cpu.dots import LANES, STEP
from specdec.kernels.cpu.jit import intrinsic, jit

_LINE = 64  # bytes
BFLOAT16 = 16  # bits of a dense weight, as Weight.table says
_FLOAT, _INDEX, _BYTE, _WORD = ir.FloatType(), ir.IntType(64), ir.IntType(8), ir.IntType(32)
_VECTOR, _WORDS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_WORD, LANES)


def _load(builder: Any, kind: Any, address: Any, offset: int = 0) -> Any:
    place = builder.add(address, _INDEX(offset)) if offset else address
    value = builder.load(builder.inttoptr(place, kind.as_pointer()))
    value.align = 1
    return value


def _codes(builder: Any, data: Any, bits: int) -> list[Any]:
    """STEP codes at an address, as two vectors of words."""
    if bits == 4:
        pairs = builder.zext(_load(builder, ir.VectorType(_BYTE, LANES), data), _WORDS)
        four = ir.Constant(_WORDS, [4] * LANES)
        low = builder.and_(pairs, ir.Constant(_WORDS, [15] * LANES))
        return [low, builder.lshr(pairs, four)]
    if bits in (8, BFLOAT16):
        kind = ir.VectorType(ir.IntType(bits), LANES)
        size = LANES * bits // 8
        return [builder.zext(_load(builder, kind, data, half * size), _WORDS) for half in range(2)]
    vectors = []
    for half in range(2):
        vector = ir.Constant(_WORDS, ir.Undefined)
        for lane in range(LANES):
            first = (half * LANES + lane) * bits
            byte = min(first // 8, STEP * bits // 8 - 2)  # two bytes, none behind the step's last
            pair = builder.zext(_load(builder, ir.IntType(16), data, byte), _WORD)
            code = builder.and_(builder.lshr(pair, _WORD(first - 8 * byte)), _WORD(2**bits - 1))
            vector = builder.insert_element(vector, code, _WORD(lane))
        vectors.append(vector)
    return vectors


def _decoder(bits: int) -> Callable[..., None]:
    """The intrinsic that decodes whole steps of weights of this many bits."""

    @intrinsic
    def decode(typing, data, scales, biases, group, size, out):  # type: ignore[no-untyped-def]
        """out: address of float32 [size]; data, scales, biases: addresses of the row's."""

        def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
            data, scales, biases, group, size, out = args
            steps = builder.sdiv(size, _INDEX(STEP))
            with cgutils.for_range(builder, steps) as loop:
                feature = builder.mul(loop.index, _INDEX(STEP))
                place = builder.add(data, builder.mul(loop.index, _INDEX(STEP * bits // 8)))
                at = builder.mul(builder.sdiv(feature, group), _INDEX(4))
                target = builder.add(out, builder.mul(feature, _INDEX(4)))
                for half, codes in enumerate(_codes(builder, place, bits)):
                    if bits == BFLOAT16:
                        shift = ir.Constant(_WORDS, [16] * LANES)
                        values = builder.bitcast(builder.shl(codes, shift), _VECTOR)
                    else:
                        factors = [
                            _spread(builder, _load(builder, _FLOAT, builder.add(base, at)))
                            for base in (scales, biases)
                        ]
                        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
                        name = f"llvm.fma.v{LANES}f32"
                        fma = cgutils.get_or_insert_function(builder.module, kind, name)
                        values = builder.call(fma, [builder.sitofp(codes, _VECTOR), *factors])
                    pointer = builder.add(target, _INDEX(half * LANES * 4))
                    stored = builder.store(values, builder.inttoptr(pointer, _VECTOR.as_pointer()))
                    stored.align = 4
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return decode


def _spread(builder: Any, value: Any) -> Any:
    vector = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, _WORD(0))
    zeros = ir.Constant(ir.VectorType(_WORD, LANES), [0] * LANES)
    return builder.shuffle_vector(vector, ir.Constant(_VECTOR, ir.Undefined), zeros)


@intrinsic
def load_float(typing, address):  # type: ignore[no-untyped-def]
    """The float32 at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
        return _load(builder, _FLOAT, args[0])

    return types.float32(types.int64), generate


@intrinsic
def load_word(typing, address, index):  # type: ignore[no-untyped-def]
    """One of the int64 from an address on."""

    def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
        place = builder.add(args[0], builder.mul(args[1], _INDEX(8)))
        return _load(builder, _INDEX, place)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def load_bfloat16(typing, address):  # type: ignore[no-untyped-def]
    """The bfloat16 at an address, as a float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
        word = builder.zext(_load(builder, ir.IntType(16), args[0]), _WORD)
        return builder.bitcast(builder.shl(word, _WORD(16)), _FLOAT)

    return types.float32(types.int64), generate


_decode2, _decode3, _decode4, _decode5, _decode6, _decode8, _decode16 = (
    _decoder(bits) for bits in (2, 3, 4, 5, 6, 8, BFLOAT16)
)


@intrinsic
def address(typing, array):  # type: ignore[no-untyped-def]
    """Where an array's values begin; good for as long as the array lives."""

    def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
        data = make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, _INDEX)

    return types.int64(array), generate


@jit
def aligned(rows, columns):  # type: ignore[no-untyped-def]
    """Room for float32 [rows, columns] that begins with a line of cache: vectors across two lines
    take twice as long to load."""
    room = np.empty(rows * columns + _LINE // 4, np.float32)
    skip = -address(room) % _LINE // 4
    return room[skip : skip + rows * columns].reshape(rows, columns)


@jit
def decode_row(bits, data, scales, biases, group, size, row):  # type: ignore[no-untyped-def]
    """Decode `size` weights to row, float32 [size or more]; data, scales, biases: addresses."""
    out = address(row)
    whole = size // STEP * STEP
    if bits == 2:
        _decode2(data, scales, biases, group, whole, out)
    elif bits == 3:
        _decode3(data, scales, biases, group, whole, out)
    elif bits == 4:
        _decode4(data, scales, biases, group, whole, out)
    elif bits == 5:
        _decode5(data, scales, biases, group, whole, out)
    elif bits == 6:
        _decode6(data, scales, biases, group, whole, out)
    elif bits == 8:
        _decode8(data, scales, biases, group, whole, out)
    elif bits == BFLOAT16:
        _decode16(data, scales, biases, group, whole, out)
        for i in range(whole, size):
            row[i] = load_bfloat16(data + 2 * i)
    else:
        for i in range(size):
            row[i] = load_float(data + 4 * i)
