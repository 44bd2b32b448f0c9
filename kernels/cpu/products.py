"""Products of input rows with the matrices of a Weight: a weight row is read once for all rows.

Blocks of up to eight input rows go through products of several weight rows at a time, which decode
4-bit weights in registers (dots.py). For more rows, and for other packings, a few weight rows are
decoded to float32 first. Every way gives a product the same bits.
"""

from collections.abc import Callable

import numpy as np

from specdec.kernels.cpu.decode import address, decode_row
from specdec.kernels.cpu.dots import CHUNK, STEP, WIDE, store_dots
from specdec.kernels.cpu.jit import inlined, jit

# A Weight's table (Weight.table): where it lies in memory, and its format.
DATA, SCALES, BIASES, BITS, GROUP, SIZE, OUT, STRIDE = range(8)

BLOCK = 4 if WIDE else 2  # weight rows side by side
MOST = 8 if WIDE else 2  # input rows beside them
TILE = 4 * MOST  # input rows for which a weight row is decoded to float32 once


def _each_block(bits: int) -> list[Callable[..., None]]:
    """Products for BLOCK weight rows (half of them at a time from 6 rows on) and 1 to 8 rows."""
    if WIDE:
        return [store_dots(bits, BLOCK if rows < 6 else 2, rows) for rows in range(1, 9)]
    return [store_dots(bits, BLOCK, min(rows, MOST)) for rows in range(1, 9)]


_plain_one, _half_one, _packed_one = (store_dots(bits, 1, 1) for bits in (32, 16, 4))
_plain1, _plain2, _plain3, _plain4, _plain5, _plain6, _plain7, _plain8 = _each_block(32)
_half1, _half2, _half3, _half4, _half5, _half6, _half7, _half8 = _each_block(16)
_packed1, _packed2, _packed3, _packed4, _packed5, _packed6, _packed7, _packed8 = _each_block(4)


@inlined
def _plain_block(rows, d, s, u, v, g, size, x, pitch, at, y, width):  # type: ignore[no-untyped-def]
    """BLOCK float32 weight rows, `s` bytes apart, with up to MOST rows."""
    if rows == 1:
        _plain1(d, s, u, v, g, size, x, pitch, at, y, width)
    elif rows == 2:
        _plain2(d, s, u, v, g, size, x, pitch, at, y, width)
    elif rows == 3:
        _plain3(d, s, u, v, g, size, x, pitch, at, y, width)
    elif rows == 4:
        _plain4(d, s, u, v, g, size, x, pitch, at, y, width)
    elif rows == 5:
        _plain5(d, s, u, v, g, size, x, pitch, at, y, width)
    else:
        for half in range(2):
            h, z = d + 2 * half * s, y + 8 * half
            if rows == 6:
                _plain6(h, s, u, v, g, size, x, pitch, at, z, width)
            elif rows == 7:
                _plain7(h, s, u, v, g, size, x, pitch, at, z, width)
            else:
                _plain8(h, s, u, v, g, size, x, pitch, at, z, width)


@inlined
def _half_block(rows, d, s, u, v, g, size, x, pitch, at, y, width):  # type: ignore[no-untyped-def]
    """BLOCK bfloat16 weight rows with up to MOST rows."""
    if rows == 1:
        _half1(d, s, u, v, g, size, x, pitch, at, y, width)
    elif rows == 2:
        _half2(d, s, u, v, g, size, x, pitch, at, y, width)
    elif rows == 3:
        _half3(d, s, u, v, g, size, x, pitch, at, y, width)
    elif rows == 4:
        _half4(d, s, u, v, g, size, x, pitch, at, y, width)
    elif rows == 5:
        _half5(d, s, u, v, g, size, x, pitch, at, y, width)
    else:
        for half in range(2):
            h, z = d + 2 * half * s, y + 8 * half
            if rows == 6:
                _half6(h, s, u, v, g, size, x, pitch, at, z, width)
            elif rows == 7:
                _half7(h, s, u, v, g, size, x, pitch, at, z, width)
            else:
                _half8(h, s, u, v, g, size, x, pitch, at, z, width)


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
def multiply(w, slot, inputs, sources, first, last, out, column):  # type: ignore[no-untyped-def]
    """out[i, column:] = the slot's matrix times inputs[sources[i]], for first <= i < last.

    w: a Weight's table; inputs float32 [n, padded] as `lay_out` made them; sources int64;
    out float32, rows contiguous.
    """
    bits, group, size, features, stride = w[BITS], w[GROUP], w[SIZE], w[OUT], w[STRIDE]
    groups = size // group * 4 if group else 0
    data = w[DATA] + slot * features * stride
    scales, biases = w[SCALES] + slot * features * groups, w[BIASES] + slot * features * groups
    x, pitch, width = address(inputs), inputs.strides[0], out.strides[0]
    padded = inputs.shape[1]
    direct = group % CHUNK == 0 if bits == 4 else bits >= 16 and size == padded
    kind = bits if direct else 32
    values = np.zeros((1 if direct else BLOCK, padded if not direct else 1), np.float32)
    # Tiles of rows that stay in the nearest cache, of about equal size; decoded weights serve
    # several blocks.
    rows, most = last - first, MOST if direct else TILE
    tiles = (rows + most - 1) // most
    for tile in range(tiles):
        start, stop = first + rows * tile // tiles, first + rows * (tile + 1) // tiles
        blocks = (stop - start + MOST - 1) // MOST
        for feature in range(0, features, BLOCK):
            count = min(BLOCK, features - feature)
            d, s = data + feature * stride, stride
            u, v = scales + feature * groups, biases + feature * groups
            if not direct:
                for i in range(count):
                    p, q = u + i * groups, v + i * groups
                    decode_row(bits, d + i * stride, p, q, group, size, values[i])
                d, s = address(values), values.strides[0]
            for block in range(blocks):
                begin = start + (stop - start) * block // blocks
                end = start + (stop - start) * (block + 1) // blocks
                y = address(out) + begin * width + (column + feature) * 4
                at = address(sources) + 8 * begin
                if count < BLOCK:
                    for i in range((end - begin) * count):
                        row, k = i // count, i % count
                        e, f, z = d + k * s, at + 8 * row, y + row * width + 4 * k
                        p, q = u + k * groups, v + k * groups
                        if kind == 4:
                            _packed_one(e, s, p, q, group, padded, x, pitch, f, z, width)
                        elif kind == 16:
                            _half_one(e, s, p, q, group, padded, x, pitch, f, z, width)
                        else:
                            _plain_one(e, s, p, q, group, padded, x, pitch, f, z, width)
                elif kind == 4:
                    _packed_block(end - begin, d, s, u, v, group, padded, x, pitch, at, y, width)
                elif kind == 16:
                    _half_block(end - begin, d, s, u, v, group, padded, x, pitch, at, y, width)
                else:
                    _plain_block(end - begin, d, s, u, v, group, padded, x, pitch, at, y, width)


@inlined
def padded_size(w):  # type: ignore[no-untyped-def]
    """Columns of the inputs of a weight."""
    return (w[SIZE] + STEP - 1) // STEP * STEP


@inlined
def lay_out(w, row, to):  # type: ignore[no-untyped-def]
    """An input row as the weight's products read it: `to` [padded], zeros behind the last."""
    size = w[SIZE]
    if w[BITS] == 4:
        for step in range(size // STEP):
            at = step * STEP
            for i in range(STEP // 2):
                to[at + i] = row[at + 2 * i]
                to[at + STEP // 2 + i] = row[at + 2 * i + 1]
    else:
        for i in range(size):
            to[i] = row[i]
        for i in range(size, len(to)):
            to[i] = 0
