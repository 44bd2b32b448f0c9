"""Rotation of rows by their positions on NumPy arrays."""

import numpy as np


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x [heads, rows, dim], its first 2 * half dimensions turned by cos, sin [rows, half]."""
    half = cos.shape[1]
    out = np.empty(x.shape, np.float32)
    first, second = x[..., :half], x[..., half : 2 * half]
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    out[..., 2 * half :] = x[..., 2 * half :]
    return out
