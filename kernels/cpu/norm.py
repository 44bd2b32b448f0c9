"""Normalizations and gates, row by row."""

import math

import numpy as np

from specdec.kernels.cpu.exp import silu
from specdec.kernels.cpu.jit import jit


def rms_norm(x: np.ndarray, weight: np.ndarray | None, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; weight [n] or None."""
    flat = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    out = np.empty_like(flat)
    _rms_norm(flat, np.ones(x.shape[-1], np.float32) if weight is None else weight, eps, out)
    return out.reshape(x.shape)


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up, element by element."""
    gate, up = np.ascontiguousarray(gate), np.ascontiguousarray(up)
    out = np.empty(up.shape, np.float32)
    size = up.shape[-1]
    _swiglu(gate.reshape(-1, size), up.reshape(-1, size), out.reshape(-1, size))
    return out


@jit
def normalize(x, weight, eps, out):  # type: ignore[no-untyped-def]
    """One row: x / sqrt(mean(x^2) + eps) * weight into out."""
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    scale = np.float32(1 / math.sqrt(total / len(x) + eps))
    for i in range(len(x)):
        out[i] = x[i] * scale * weight[i]


@jit
def _rms_norm(x, weight, eps, out):  # type: ignore[no-untyped-def]
    for row in range(x.shape[0]):
        normalize(x[row], weight, eps, out[row])


@jit
def _swiglu(gate, up, out):  # type: ignore[no-untyped-def]
    for row in range(gate.shape[0]):
        for i in range(gate.shape[1]):
            out[row, i] = silu(gate[row, i]) * up[row, i]
