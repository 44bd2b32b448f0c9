"""Linear layers for a few rows, and the embedding lookup.

A row's result must not depend on the rows computed with it (row-invariance): verification of a
tree has to give each row the bits that decoding it alone would give.
"""

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array, OnCpu, evaluate, is_numpy
from specdec.kernels.weight import Weight

cpu = OnCpu("linear")


def linear(x: Array, weight: Weight) -> Array:
    """x [rows, in] times the transposed weight [out, in]: [rows, out] in x's dtype."""
    if is_numpy(x):
        return cpu.linear(x, weight)
    if not weight.quantized:
        return x @ weight.data.swapaxes(-1, -2)
    return mx.quantized_matmul(
        x,
        weight.data,
        weight.scales,
        weight.biases,
        transpose=True,
        group_size=weight.group_size,
        bits=weight.bits,
    )


class Projections:
    """Several projections of the same input; those of one format are computed as one matrix."""

    def __init__(self, weights: list[Weight]) -> None:
        self.matrices: list[Weight] = []
        self._pieces: list[list[int]] = []  # per matrix, where it is split
        for weight in weights:
            if self.matrices and weight.same_format(self.matrices[-1]):
                self._pieces[-1].append(self.matrices[-1].out_features)
                self.matrices[-1] = weight.stacked_on(self.matrices[-1])
            else:
                self.matrices.append(weight)
                self._pieces.append([])
        # Evaluated here, so that the parts are freed before the next layer is read.
        evaluate(*(array for m in self.matrices for array in m.arrays if array is not None))

    def __call__(self, x: Array) -> list[Array]:
        """x [rows, in] -> one [rows, out_i] for every projection, in the order given."""
        outputs = []
        for matrix, pieces in zip(self.matrices, self._pieces, strict=True):
            y = linear(x, matrix)
            starts = [0, *pieces]
            outputs += [y[:, a:b] for a, b in zip(starts, [*pieces, None], strict=True)]
        return outputs


def embed(ids: np.ndarray, weight: Weight) -> Array:
    """Rows of the embedding: ids int32 [rows] -> [rows, hidden] in the weight's float dtype."""
    if is_numpy(weight.data):
        return cpu.embed(ids, weight)
    index = mx.array(np.asarray(ids))
    if weight.scales is None or weight.biases is None:
        return weight.data[index]
    return mx.dequantize(
        weight.data[index],
        weight.scales[index],
        weight.biases[index],
        group_size=weight.group_size,
        bits=weight.bits,
    )
