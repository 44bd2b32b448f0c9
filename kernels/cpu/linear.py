"""Quantized and dense matrix products for a few rows: a weight row is read and decoded once.

One kernel serves plain linear layers and experts: output features of a matrix chosen per group of
input rows. A linear layer is one group with one matrix.

4-bit weights are decoded into the even and the odd input features apart, which keeps the decoding
in vector registers; the inputs are laid out the same way first.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from specdec.kernels.cpu.jit import jit
from specdec.kernels.weight import Weight

ONE_GROUP = np.zeros(1, np.int64)


def linear(x: np.ndarray, weight: Weight) -> np.ndarray:
    """x [rows, in] times the transposed weight: [rows, out]."""
    return grouped(x, weight.stack(), ONE_GROUP, np.array([0, len(x)]), np.arange(len(x)))


def grouped(
    x: np.ndarray, weight: Weight, slots: np.ndarray, ends: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Products of input rows with the matrices of a stack, group by group.

    x [n, in]; weight [stack, out, in]; slots int [groups]: the matrix of each group; ends int
    [groups + 1]: where the groups begin and end in rows; rows int [pairs]: the row of x of each
    pair. Returns [pairs, out].
    """
    out = np.empty((len(rows), weight.out_features), np.float32)
    data = weight.data
    if not weight.quantized:
        _dense(np.ascontiguousarray(x), data, slots, ends, rows, out)
        return out
    packed = data.view(np.uint8)
    if weight.bits == 4:
        x = np.concatenate([x[:, 0::2], x[:, 1::2]], axis=1)
        _four_bits(weight.group_size // 2)(
            x, packed, weight.scales, weight.biases, slots, ends, rows, out
        )
    else:
        _other_bits(weight.bits, weight.group_size)(
            np.ascontiguousarray(x), packed, weight.scales, weight.biases, slots, ends, rows, out
        )
    return out


def embed(ids: np.ndarray, weight: Weight) -> np.ndarray:
    """Rows of the embedding: ids int [n] -> [n, hidden]."""
    if not weight.quantized:
        return weight.data[ids]
    out = np.empty((len(ids), weight.in_features), np.float32)
    _decode_rows(
        weight.data.view(np.uint8),
        weight.scales,
        weight.biases,
        ids,
        weight.bits,
        weight.group_size,
        out,
    )
    return out


@cache
def _four_bits(half_group: int) -> Callable[..., None]:
    """The kernel for one group size; constant trip counts are what lets the decoding vectorize."""

    @jit
    def kernel(x, packed, scales, biases, slots, ends, rows, out):  # type: ignore[no-untyped-def]
        half = packed.shape[2]
        groups = scales.shape[2]
        low = np.empty(half, np.float32)
        high = np.empty(half, np.float32)
        for part in range(len(slots)):
            slot = slots[part]
            for feature in range(packed.shape[1]):
                for group in range(groups):
                    scale = scales[slot, feature, group]
                    bias = biases[slot, feature, group]
                    at = group * half_group
                    for i in range(half_group):
                        byte = packed[slot, feature, at + i]
                        low[at + i] = np.float32(np.int32(byte & 15)) * scale + bias
                        high[at + i] = np.float32(np.int32(byte >> 4)) * scale + bias
                for pair in range(ends[part], ends[part + 1]):
                    row = rows[pair]
                    total = np.float32(0)
                    for i in range(half):
                        total += low[i] * x[row, i] + high[i] * x[row, half + i]
                    out[pair, feature] = total

    return kernel


@cache
def _other_bits(bits: int, group_size: int) -> Callable[..., None]:
    """The kernel for 8 bits, and for 2, 3, 5 and 6 through a bit stream."""

    @jit
    def kernel(x, packed, scales, biases, slots, ends, rows, out):  # type: ignore[no-untyped-def]
        size = x.shape[1]
        groups = scales.shape[2]
        values = np.empty(size, np.float32)
        for part in range(len(slots)):
            slot = slots[part]
            for feature in range(packed.shape[1]):
                for group in range(groups):
                    scale = scales[slot, feature, group]
                    bias = biases[slot, feature, group]
                    at = group * group_size
                    for i in range(group_size):
                        if bits == 8:
                            code = np.int32(packed[slot, feature, at + i])
                        else:
                            code = _code(packed[slot, feature], at + i, bits)
                        values[at + i] = np.float32(code) * scale + bias
                for pair in range(ends[part], ends[part + 1]):
                    row = rows[pair]
                    total = np.float32(0)
                    for i in range(size):
                        total += values[i] * x[row, i]
                    out[pair, feature] = total

    return kernel


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
def _decode_rows(packed, scales, biases, ids, bits, group_size, out):  # type: ignore[no-untyped-def]
    for n in range(len(ids)):
        row = ids[n]
        for i in range(out.shape[1]):
            group = i // group_size
            code = np.float32(_code(packed[row], i, bits))
            out[n, i] = code * scales[row, group] + biases[row, group]


@jit
def _dense(x, data, slots, ends, rows, out):  # type: ignore[no-untyped-def]
    for part in range(len(slots)):
        slot = slots[part]
        for feature in range(data.shape[1]):
            for pair in range(ends[part], ends[part + 1]):
                row = rows[pair]
                total = np.float32(0)
                for i in range(data.shape[2]):
                    total += data[slot, feature, i] * x[row, i]
                out[pair, feature] = total
