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


@inlined
def multiply(w, slot, inputs, sources, first, last, out, column):  # type: ignore[no-untyped-def]
    """out[i, column:] = the slot's matrix times inputs[sources[i]], for first <= i < last.

    w: a Weight's table; inputs float32 [n, padded] as `lay_out` made them; sources int64;
    out float32, rows contiguous.
    """
    bits, group, size, features, stride = w[BITS], w[GROUP], w[SIZE], w[OUT], w[STRIDE]
    groups = size // group * 4 if group else 0
    data = w[DATA] + slot * features * stride
    scales, biases = w[SCALES] + slot * features * groups, w[BIASES] + slot * features * groups
    pitch, width = inputs.strides[0], out.strides[0]
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
        for feature in range(0, features, BLOCK):
            count = min(BLOCK, features - feature)
            d, s = data + feature * stride, stride
            u, v = scales + feature * groups, biases + feature * groups
            if not direct:
                for i in range(count):
                    p, q = u + i * groups, v + i * groups
                    decode_row(bits, d + i * stride, p, q, group, size, values[i])
                d, s = address(values), values.strides[0]
            # Addresses are taken here because an array lives until its last use in the code.
            x, at = address(inputs), address(sources) + 8 * start
            y = address(out) + start * width + (column + feature) * 4
            if count < BLOCK:
                for i in range((stop - start) * count):
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
                _packed_block(stop - start, d, s, u, v, group, padded, x, pitch, at, y, width)
            elif kind == 16:
                _half_rows(stop - start, d, s, padded, x, pitch, at, y, width)
            else:
                _plain_rows(stop - start, d, s, padded, x, pitch, at, y, width)


@inlined
def multiply_plain(values, inputs, features, rows, sources, out):  # type: ignore[no-untyped-def]
    """out[: rows, : features] = values float32 [features or more, size] times the first `rows`
    of inputs [n, size]; size is a multiple of STEP."""
    size = inputs.shape[1]
    stride, pitch, width = values.strides[0], inputs.strides[0], out.strides[0]
    for feature in range(0, features, BLOCK):
        count = min(BLOCK, features - feature)
        d, x, at = address(values) + feature * stride, address(inputs), address(sources)
        y = address(out) + 4 * feature
        if count == BLOCK:
            _plain_rows(rows, d, stride, size, x, pitch, at, y, width)
        else:
            for i in range(rows * count):
                row, k = i // count, i % count
                e, f, z = d + k * stride, at + 8 * row, y + row * width + 4 * k
                _plain_one(e, stride, 0, 0, 0, size, x, pitch, f, z, width)


@jit
def padded_size(w):  # type: ignore[no-untyped-def]
    """Columns of the inputs of a weight."""
    return (w[SIZE] + STEP - 1) // STEP * STEP


@jit
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
