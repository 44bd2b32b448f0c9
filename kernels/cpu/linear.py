"""Quantized and dense matrix products for a few rows: a weight row is read and decoded once.

One kernel serves plain linear layers and experts: groups of input rows, each with one matrix of a
stack. A linear layer is one group with one matrix. A few weight rows are decoded to float32 and
then multiplied with all rows of the group (dots.py).

4-bit weights are decoded into the even and the odd input features apart, which keeps the decoding
in vector registers; the inputs are laid out the same way first. Inputs and decoded rows are padded
with zeros to whole steps of the dot product.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from specdec.kernels.cpu.dots import (
    STEP,
    WIDE,
    store_1x1,
    store_1x2,
    store_1x4,
    store_4x1,
    store_4x2,
)
from specdec.kernels.cpu.jit import jit
from specdec.kernels.norm import Norm
from specdec.kernels.weight import Weight

BLOCK = 4 if WIDE else 1  # weight rows decoded at a time


def linear(
    x: np.ndarray, weight: Weight, norm: Norm | None = None, residual: np.ndarray | None = None
) -> np.ndarray:
    """residual + weight norm(x): x [rows, in] -> [rows, out]."""
    y = grouped(x if norm is None else norm(x), weight, *_one_group(len(x)))
    return y if residual is None else residual + y


def grouped(
    x: np.ndarray, weight: Weight, slots: np.ndarray, ends: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Products of input rows with the matrices of a stack, group by group.

    x [n, in]; weight [stack, out, in] (or one matrix [out, in], then all slots are 0); slots int64
    [groups]: the matrix of each group; ends int64 [groups + 1]: where the groups begin and end in
    rows; rows int64 [pairs]: the row of x of each pair. Returns [pairs, out].
    """
    data, scales, biases = weight.bytes_on_cpu
    out = np.empty((len(rows), data.shape[1]), np.float32)
    kernel = _kernel(weight.bits, weight.group_size)
    kernel(np.ascontiguousarray(x), data, scales, biases, slots, ends, rows, out)
    return out


def embed(ids: np.ndarray, weight: Weight) -> np.ndarray:
    """Rows of the embedding: ids int [n] -> [n, hidden]."""
    if not weight.quantized:
        return weight.data[ids]
    data, scales, biases = weight.bytes_on_cpu
    out = np.empty((len(ids), weight.in_features), np.float32)
    _rows(data[0], scales[0], biases[0], ids, weight.bits, weight.group_size, out)
    return out


@cache
def _one_group(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """slots, ends and rows of a single group of all rows."""
    return np.zeros(1, np.int64), np.array([0, rows]), np.arange(rows)


@cache
def _kernel(bits: int, group_size: int) -> Callable[..., None]:
    """`grouped` for one packing; bits 0 is dense.

    Closes over numbers alone: Numba's cache on disk knows a closure by its values, and a compiled
    function among them would be another one in every process. The trip counts of the decoding
    loops must be constants for the compiler to vectorize them.
    """
    half_group = group_size // 2

    @jit
    def kernel(x, data, scales, biases, slots, ends, rows, out):  # type: ignore[no-untyped-def]
        size = x.shape[1]
        half = size // 2
        padded = (size + STEP - 1) // STEP * STEP
        inputs = np.zeros((x.shape[0], padded), np.float32)
        for row in range(x.shape[0]):
            if bits == 4:
                for i in range(half):
                    inputs[row, i] = x[row, 2 * i]
                    inputs[row, half + i] = x[row, 2 * i + 1]
            else:
                for i in range(size):
                    inputs[row, i] = x[row, i]
        values = np.zeros((BLOCK, padded), np.float32)
        for part in range(len(slots)):
            slot = slots[part]
            for first in range(0, data.shape[1], BLOCK):
                features = min(BLOCK, data.shape[1] - first)
                for index in range(features):
                    # As arrays of their own: two places in one array might overlap, for all the
                    # compiler knows.
                    row, low, high = values[index], values[index, :half], values[index, half:]
                    codes = data[slot, first + index]
                    if bits == 0:
                        for i in range(size):
                            row[i] = codes[i]
                    for group in range(scales.shape[2]):
                        scale = scales[slot, first + index, group]
                        bias = biases[slot, first + index, group]
                        at = group * (half_group if bits == 4 else group_size)
                        if bits == 4:
                            for i in range(half_group):
                                byte = codes[at + i]
                                low[at + i] = np.float32(np.int32(byte & 15)) * scale + bias
                                high[at + i] = np.float32(np.int32(byte >> 4)) * scale + bias
                        elif bits == 8:
                            for i in range(group_size):
                                row[at + i] = np.float32(np.int32(codes[at + i])) * scale + bias
                        elif bits > 0:
                            for i in range(group_size):
                                code = np.float32(_code(codes, at + i, bits))
                                row[at + i] = code * scale + bias
                pair, end = ends[part], ends[part + 1]
                if WIDE and features == BLOCK:
                    while pair + 2 <= end:
                        store_4x2(values, inputs, rows, pair, out, first)
                        pair += 2
                    if pair < end:
                        store_4x1(values, inputs, rows, pair, out, first)
                else:
                    for index in range(features):
                        _one_feature(values[index:], inputs, rows, pair, end, out, first + index)

    return kernel


@jit
def _one_feature(values, inputs, rows, pair, end, out, feature):  # type: ignore[no-untyped-def]
    while pair + 4 <= end:
        store_1x4(values, inputs, rows, pair, out, feature)
        pair += 4
    if pair + 2 <= end:
        store_1x2(values, inputs, rows, pair, out, feature)
        pair += 2
    if pair < end:
        store_1x1(values, inputs, rows, pair, out, feature)


@jit
def _code(packed, index, bits):  # type: ignore[no-untyped-def]
    """Value `index` of a little-endian stream of `bits`-bit values, as MLX packs all widths."""
    at = index * bits
    byte, shift = at >> 3, at & 7
    word = np.int32(packed[byte])
    if shift + bits > 8:
        word |= np.int32(packed[byte + 1]) << 8
    return np.int32((word >> shift) & ((1 << bits) - 1))


@jit
def _rows(packed, scales, biases, ids, bits, group_size, out):  # type: ignore[no-untyped-def]
    for n in range(len(ids)):
        row = ids[n]
        for i in range(out.shape[1]):
            group = i // group_size
            code = np.float32(_code(packed[row], i, bits))
            out[n, i] = code * scales[row, group] + biases[row, group]
