"""Linear layers for a few rows, and the embedding lookup.

A row's result must not depend on the rows computed with it (row-invariance): verification of a
tree has to give each row the bits that decoding it alone would give.
"""

from typing import NamedTuple

import mlx.core as mx

from specdec.kernels.array import Array, evaluate
from specdec.kernels.executor import operation
from specdec.kernels.norm import Norm
from specdec.kernels.weight import Weight

# MLX 0.32.4's product for several rows gives NaN on CUDA for rows of weights shorter than this.
SHORT = 128


class Piece(NamedTuple):
    """The columns start to start + width - 1 of rows [rows, n]."""

    rows: Array
    start: int
    width: int

    @property
    def values(self) -> Array:
        """[rows, width]."""
        return self.rows[:, self.start : self.start + self.width]


@operation("few rows")
def linear(
    x: Array, weight: Weight, norm: Norm | None = None, residual: Array | None = None
) -> Array:
    """residual + weight norm(x): x [rows, in] -> [rows, out] in x's dtype.

    weight [out, in]; residual [rows, out]. What stands between x and the result may be rounded to
    x's dtype or not.
    """
    if norm is not None:
        x = norm(x)
    if not weight.quantized:
        y = x @ weight.data.swapaxes(-1, -2)
    elif mx.cuda.is_available() and weight.in_features < SHORT:
        y = x @ mx.dequantize(*weight.arrays, weight.group_size, weight.bits).T
    else:
        y = mx.quantized_matmul(
            x,
            weight.data,
            weight.scales,
            weight.biases,
            transpose=True,
            group_size=weight.group_size,
            bits=weight.bits,
        )
    return y if residual is None else residual + y


class Projections:
    """Several projections of the same input; those of one format are computed as one matrix."""

    def __init__(self, weights: list[Weight]) -> None:
        self.matrices: list[Weight] = []
        self._places: list[tuple[int, int, int]] = []  # of each: matrix, first feature, features
        for weight in weights:
            if self.matrices and weight.same_format(self.matrices[-1]):
                start = self.matrices[-1].out_features
                self.matrices[-1] = weight.stacked_on(self.matrices[-1])
            else:
                start = 0
                self.matrices.append(weight)
            self._places.append((len(self.matrices) - 1, start, weight.out_features))
        # Evaluated here, so that the parts are freed before the next layer is read.
        evaluate(*(array for m in self.matrices for array in m.arrays if array is not None))

    def __call__(self, x: Array, norm: Norm | None = None) -> list[Piece]:
        """x [rows, in] -> what each projection makes of norm(x), in the order given."""
        outputs = [linear(x, matrix, norm) for matrix in self.matrices]
        return [Piece(outputs[matrix], start, width) for matrix, start, width in self._places]

    def after(self, first: int) -> "Projections":
        """Those from the given one on: views of the same matrices."""
        rest = Projections([])
        matrix, skipped, _ = self._places[first]
        rest.matrices = [self.matrices[matrix].part(skipped, self.matrices[matrix].out_features)]
        rest.matrices += self.matrices[matrix + 1 :]
        rest._places = [
            (at - matrix, start - skipped * (at == matrix), width)
            for at, start, width in self._places[first:]
        ]
        return rest

    def weight(self, index: int) -> Weight:
        """One of the projections by itself: a view of the matrix it is part of."""
        matrix, start, width = self._places[index]
        return self.matrices[matrix].part(start, start + width)


@operation(decides=1)
def embed(ids: Array, weight: Weight) -> Array:
    """Rows of the embedding: ids int32 [rows] -> [rows, hidden] in the weight's float dtype."""
    index = mx.array(ids)
    if weight.scales is None or weight.biases is None:
        return weight.data[index]
    return mx.dequantize(
        weight.data[index],
        weight.scales[index],
        weight.biases[index],
        group_size=weight.group_size,
        bits=weight.bits,
    )
