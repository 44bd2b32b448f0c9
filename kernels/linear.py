"""Linear layers for a few rows, and the embedding lookup.

A row's result must not depend on the rows computed with it (row-invariance): verification of a
tree has to give each row the bits that decoding it alone would give.
"""

import mlx.core as mx

from specdec.kernels.weight import Weight


def linear(x: mx.array, weight: Weight) -> mx.array:
    """x [rows, in] times the transposed weight [out, in]: [rows, out] in x's dtype."""
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


def embed(ids: mx.array, weight: Weight) -> mx.array:
    """Rows of the embedding: ids int32 [rows] -> [rows, hidden], dequantized in the scales' dtype."""
    if weight.scales is None or weight.biases is None:
        return weight.data[ids]
    return mx.dequantize(
        weight.data[ids],
        weight.scales[ids],
        weight.biases[ids],
        group_size=weight.group_size,
        bits=weight.bits,
    )
