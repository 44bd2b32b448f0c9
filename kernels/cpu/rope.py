"""Rotation of rows by their positions on NumPy arrays."""

import math

import numpy as np

from specdec.kernels.cpu.exp import fma
from specdec.kernels.cpu.jit import jit


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x [..., rows, dim], its first 2 * half dimensions turned by cos, sin [rows, half]."""
    out = np.array(x, order="C")
    _rotate(out.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]), cos, sin)
    return out


@jit
def turn(x, cos, sin):  # type: ignore[no-untyped-def]
    """One row, in place."""
    half = len(cos)
    for i in range(half):
        first, second = x[i], x[half + i]
        # Which of two products is rounded must not be the compiler's choice.
        x[i] = fma(first, cos[i], -(second * sin[i]))
        x[half + i] = fma(second, cos[i], first * sin[i])


@jit
def _rotate(x, cos, sin):  # type: ignore[no-untyped-def]
    for head in range(x.shape[0]):
        for row in range(x.shape[1]):
            turn(x[head, row], cos[row], sin[row])
