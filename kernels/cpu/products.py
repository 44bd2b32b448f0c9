"""Products of input rows with the matrices of a Weight: a weight row is read once for all rows.

Blocks of up to eight input rows go through products of several weight rows at a time, which decode
4-bit weights in registers (dots.py). For more rows, and for other packings, a few weight rows are
decoded to float32 first. Every way gives a product the same bits.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from specdec.kernels.cpu.decode import address, aligned, decode_row, load_word
from specdec.kernels.cpu.dots import CHUNK, STEP, WIDE, store_dots
from specdec.kernels.cpu.jit import entry, inlined, intrinsic, jit

# A Weight's table (Weight.table): where it lies in memory, and its format.
DATA, SCALES, BIASES, BITS, GROUP, SIZE, OUT, STRIDE = range(8)

BLOCK = 4 if WIDE else 2  # weight rows side by side
MOST = 8 if WIDE else 2  # input rows beside them
TILE = 4 * MOST  # input rows for which a weight row is decoded to float32 once
# Of a product that threads share: what a part must be worth, in weights times (4 + rows), about
# two microseconds; and how many parts there are at most.
PART, PARTS = 1 << 17, 1024
LINE = 16  # floats of a line of cache: parts do not write to one another's


def _block(bits: int, rows: int) -> Callable[..., None]:
    """Products for BLOCK weight rows, from 6 rows on for half of them."""
    if WIDE:
        return store_dots(bits, BLOCK if rows < 6 else BLOCK // 2, rows)
    return store_dots(bits, BLOCK, min(rows, MOST))


_plain_one, _half_one, _packed_one = (store_dots(bits, 1, 1) for bits in (32, 16, 4))
_plain1, _plain2, _plain4, _plain8 = (_block(32, rows) for rows in (1, 2, 4, 8))
_half1, _half2, _half4, _half8 = (_block(16, rows) for rows in (1, 2, 4, 8))
_packed1, _packed2, _packed3, _packed4, _packed5, _packed6, _packed7, _packed8 = (
    _block(4, rows) for rows in range(1, 9)
)


@inlined
def _plain_rows(rows, d, s, size, x, pitch, at, y, width):  # type: ignore[no-untyped-def]
    """BLOCK float32 weight rows, `s` bytes apart, with any number of rows."""
    done = 0
    while done < rows:
        left, f, z = rows - done, at + 8 * done, y + done * width
        if WIDE and left >= 8:
            _plain8(d, s, 0, 0, 0, size, x, pitch, f, z, width)
            _plain8(d + 2 * s, s, 0, 0, 0, size, x, pitch, f, z + 8, width)
            done += 8
        elif WIDE and left >= 4:
            _plain4(d, s, 0, 0, 0, size, x, pitch, f, z, width)
            done += 4
        elif left >= 2:
            _plain2(d, s, 0, 0, 0, size, x, pitch, f, z, width)
            done += 2
        else:
            _plain1(d, s, 0, 0, 0, size, x, pitch, f, z, width)
            done += 1


@inlined
def _half_rows(rows, d, s, size, x, pitch, at, y, width):  # type: ignore[no-untyped-def]
    """BLOCK bfloat16 weight rows with any number of rows."""
    done = 0
    while done < rows:
        left, f, z = rows - done, at + 8 * done, y + done * width
        if WIDE and left >= 8:
            _half8(d, s, 0, 0, 0, size, x, pitch, f, z, width)
            _half8(d + 2 * s, s, 0, 0, 0, size, x, pitch, f, z + 8, width)
            done += 8
        elif WIDE and left >= 4:
            _half4(d, s, 0, 0, 0, size, x, pitch, f, z, width)
            done += 4
        elif left >= 2:
            _half2(d, s, 0, 0, 0, size, x, pitch, f, z, width)
            done += 2
        else:
            _half1(d, s, 0, 0, 0, size, x, pitch, f, z, width)
            done += 1


@inlined
def _packed_block(rows, d, s, u, v, g, size, x, pitch, at, y, width):  # type: ignore[no-untyped-def]
    """BLOCK 4-bit weight rows with up to MOST rows."""
    if rows == 1:
        _packed1(d, s, u, v, g, size, x, pitch, at, y, width)
    elif rows == 2:
        _packed2(d, s, u, v, g, size, x, pitch, at, y, width)
    elif rows == 3:
        _packed3(d, s, u, v, g, size, x, pitch, at, y, width)
    elif rows == 4:
        _packed4(d, s, u, v, g, size, x, pitch, at, y, width)
    elif rows == 5:
        _packed5(d, s, u, v, g, size, x, pitch, at, y, width)
    else:
        skip = size // g * 4
        for half in range(2):
            h, p, q, z = d + 2 * half * s, u + 2 * half * skip, v + 2 * half * skip, y + 8 * half
            if rows == 6:
                _packed6(h, s, p, q, g, size, x, pitch, at, z, width)
            elif rows == 7:
                _packed7(h, s, p, q, g, size, x, pitch, at, z, width)
            else:
                _packed8(h, s, p, q, g, size, x, pitch, at, z, width)


@jit
def _multiply(w, slot, inputs, pitch, sources, rows, out, width, start, stop):  # type: ignore[no-untyped-def]
    bits, group, size, features = (
        load_word(w, BITS),
        load_word(w, GROUP),
        load_word(w, SIZE),
        load_word(w, OUT),
    )
    stride, padded = load_word(w, STRIDE), (size + STEP - 1) // STEP * STEP
    groups = size // group * 4 if group else 0
    data = load_word(w, DATA) + slot * features * stride
    scales = load_word(w, SCALES) + slot * features * groups
    biases = load_word(w, BIASES) + slot * features * groups
    direct = group % CHUNK == 0 if bits == 4 else bits >= 16 and size == padded
    kind = bits if direct else 32
    values = aligned(1 if direct else BLOCK, padded if not direct else 1)
    values[:] = 0
    # Tiles of rows that stay in the nearest cache, of about equal size; decoded weights serve
    # several blocks.
    most = MOST if direct else TILE
    tiles = (rows + most - 1) // most
    for tile in range(tiles):
        top, bottom = rows * tile // tiles, rows * (tile + 1) // tiles
        at = sources + 8 * top
        for feature in range(start, stop, BLOCK):
            count = min(BLOCK, stop - feature)
            d, s = data + feature * stride, stride
            u, v = scales + feature * groups, biases + feature * groups
            y = out + top * width + feature * 4
            if not direct:
                for i in range(count):
                    p, q = u + i * groups, v + i * groups
                    decode_row(bits, d + i * stride, p, q, group, size, values[i])
                # Taken here because an array lives until its last use in the code.
                d, s = address(values), values.strides[0]
            if count < BLOCK:
                for i in range((bottom - top) * count):
                    row, k = i // count, i % count
                    e, f, z = d + k * s, at + 8 * row, y + row * width + 4 * k
                    p, q = u + k * groups, v + k * groups
                    if kind == 4:
                        _packed_one(e, s, p, q, group, padded, inputs, pitch, f, z, width)
                    elif kind == 16:
                        _half_one(e, s, p, q, group, padded, inputs, pitch, f, z, width)
                    else:
                        _plain_one(e, s, p, q, group, padded, inputs, pitch, f, z, width)
            elif kind == 4:
                _packed_block(bottom - top, d, s, u, v, group, padded, inputs, pitch, at, y, width)
            elif kind == 16:
                _half_rows(bottom - top, d, s, padded, inputs, pitch, at, y, width)
            else:
                _plain_rows(bottom - top, d, s, padded, inputs, pitch, at, y, width)


@cache
def products() -> int:
    """Where the compiled products stand, for `multiply`. Their code is the largest of all, and
    what calls it in Numba's way gets a copy of it, compiled anew."""
    return entry(_multiply, 10)


@intrinsic
def _call(typing, function, words):  # type: ignore[no-untyped-def]
    """A compiled function that takes words, at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Sequence[Any]) -> Any:
        given = cgutils.unpack_tuple(builder, args[1])
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in given])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), given)
        return context.get_dummy_value()

    return types.void(function, words), generate


@jit
def multiply(products, w, slot, inputs, sources, out, start, stop):  # type: ignore[no-untyped-def]
    """out[i, start:stop] = these features of the slot's matrix times inputs[sources[i]].

    products: `products()`; w: a Weight's table; inputs float32 [n, padded] as `lay_out` made them;
    sources int64 [m]; out float32 [m or more, features], rows contiguous; start: a multiple of
    BLOCK.
    """
    places = address(inputs), inputs.strides[0], address(sources), len(sources)
    to = address(out), out.strides[0], start, stop
    _call(products, (address(w), np.int64(slot), *places, *to))


@jit
def part_width(features, size, rows, step):  # type: ignore[no-untyped-def]
    """Features of a part, a multiple of `step`, for `features` of `size` weights times `rows`."""
    least = PART // (size * (4 + rows)) // step * step
    most = (features + PARTS - 1) // PARTS
    return max(least, (most + step - 1) // step * step, step)


@jit
def padded_size(w):  # type: ignore[no-untyped-def]
    """Columns of the inputs of a weight."""
    return (w[SIZE] + STEP - 1) // STEP * STEP


@jit
def lay_out(w, row, to):  # type: ignore[no-untyped-def]
    """An input row as the weight's products read it: `to` [padded], zeros behind the last."""
    lay_out_part(w, row, to, 0, w[SIZE])


@jit
def lay_out_part(w, row, to, start, stop):  # type: ignore[no-untyped-def]
    """The features start to stop - 1 of it; start: a multiple of STEP, stop: one, or the end."""
    if w[BITS] == 4:
        for at in range(start, stop, STEP):
            for i in range(STEP // 2):
                to[at + i] = row[at + 2 * i]
                to[at + STEP // 2 + i] = row[at + 2 * i + 1]
    else:
        for i in range(start, stop):
            to[i] = row[i]
        if stop == w[SIZE]:
            for i in range(stop, padded_size(w)):
                to[i] = 0
