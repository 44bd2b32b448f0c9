"""Random linear layers, and what they should give: float64 products of decoded matrices."""

import mlx.core as mx
import numpy as np

from specdec.kernels.gpu import linear as gpu
from specdec.kernels.norm import Norm
from specdec.kernels.weight import Weight
from tests.kernels.gpu.arrays import exact
from tests.kernels.weights import normal, some_weight
from tests.metal.run import through_shim

# of sums against float64, relative to the largest; weights and x are rounded to the dtype before
DTYPES = {mx.float32: 5e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


def as_dtype(weight: Weight, dtype: mx.Dtype) -> tuple[Weight, np.ndarray]:
    """The weight with floats of a dtype, and the matrix that it then stands for."""
    if not weight.quantized:
        data = weight.data.astype(dtype)
        return Weight(data), exact(data)
    scales, biases = weight.scales.astype(dtype), weight.biases.astype(dtype)
    one, zero = mx.ones(scales.shape), mx.zeros(scales.shape)
    bits, size = weight.bits, weight.group_size
    codes = exact(mx.dequantize(weight.data, one, zero, group_size=size, bits=bits))
    scale, bias = (np.repeat(exact(a), size, axis=-1) for a in (scales, biases))
    return Weight(weight.data, scales, biases, bits, size), codes * scale + bias


def bits_of(x: mx.array) -> np.ndarray:
    return np.array(x.view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


class Problem:
    """Random inputs of a linear layer, and what it should give."""

    def __init__(
        self, bits, group, rows, size, out, norm, residual, dtype: mx.Dtype = mx.float32
    ) -> None:
        rng = np.random.default_rng(bits)
        made = some_weight(rng, out, size, packing=(bits, group) if bits else None)[0]
        self.weight, matrix = as_dtype(made, dtype)
        self.x = mx.array(normal(rng, rows, size) * 3).astype(dtype)
        scale = mx.array(rng.uniform(0.5, 1.5, size)).astype(dtype)
        self.norm = Norm(scale, 0.5) if norm else None  # eps matters
        self.residual = mx.array(normal(rng, rows, out)).astype(dtype) if residual else None
        x = exact(self.x)
        if norm:
            x = x / np.sqrt((x**2).mean(1, keepdims=True) + 0.5) * exact(scale)
        self.expected = x @ matrix.T + (exact(self.residual) if residual else 0.0)

    def run(self, rows=slice(None), **options) -> mx.array:
        """The layer for some of the rows."""
        residual = None if self.residual is None else self.residual[rows]
        with through_shim(**options):
            return gpu.linear(self.x[rows], self.weight, self.norm, residual)
