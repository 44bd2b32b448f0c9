"""Random arrays for the GPU kernels' tests, and what they hold in float64."""

import mlx.core as mx
import numpy as np


def random(shape, seed, dtype=mx.float32):
    return mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(dtype)


def exact(x) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)
