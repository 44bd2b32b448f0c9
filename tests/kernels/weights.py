"""Random weights for tests of the kernels: packed by a formula of their own, not by MLX's."""

import mlx.core as mx
import numpy as np

from specdec.kernels.weight import Weight

PACKINGS = [(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def packed(rng: np.random.Generator, *shape: int, bits: int, group_size: int) -> tuple:
    """A random quantized weight [..., out, in] and the float64 matrix it stands for.

    The codes of a row form one little-endian stream of bits in uint32 words.
    """
    codes = rng.integers(0, 1 << bits, shape)
    groups = (*shape[:-1], shape[-1] // group_size)
    scales = (rng.uniform(0.5, 2.0, groups) / (1 << bits) / np.sqrt(shape[-1])).astype(np.float32)
    biases = (-scales * (1 << bits) * rng.uniform(0.2, 0.8, groups)).astype(np.float32)
    stream = (codes[..., None] >> np.arange(bits)) & 1  # low bits first
    stream = stream.reshape(*shape[:-1], -1).astype(np.uint8)
    data = np.ascontiguousarray(np.packbits(stream, axis=-1, bitorder="little")).view(np.uint32)
    each = np.repeat(scales, group_size, axis=-1), np.repeat(biases, group_size, axis=-1)
    matrix = codes * each[0].astype(np.float64) + each[1].astype(np.float64)
    weight = Weight(mx.array(data), mx.array(scales), mx.array(biases), bits, group_size)
    return weight, matrix


def dense(rng: np.random.Generator, *shape: int) -> tuple:
    """A random dense weight [..., out, in] and the same in float64."""
    values = normal(rng, *shape) / np.float32(np.sqrt(shape[-1]))
    return Weight(mx.array(values)), values.astype(np.float64)


def some_weight(rng: np.random.Generator, *shape: int, packing: tuple[int, int] | None) -> tuple:
    """Dense, or quantized with (bits, group size)."""
    if packing is None:
        return dense(rng, *shape)
    return packed(rng, *shape, bits=packing[0], group_size=packing[1])
