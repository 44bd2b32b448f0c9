"""Quantized and dense linear layers for a few rows, with the norm before and the residual after."""

import numpy as np

from specdec.kernels.cpu.decode import decode_row
from specdec.kernels.cpu.dots import STEP
from specdec.kernels.cpu.jit import jit
from specdec.kernels.cpu.norm import normalize
from specdec.kernels.cpu.products import (
    BIASES,
    BITS,
    DATA,
    GROUP,
    SCALES,
    SIZE,
    STRIDE,
    lay_out,
    multiply,
    padded_size,
)
from specdec.kernels.norm import Norm
from specdec.kernels.weight import Weight

_NONE = np.zeros(0, np.float32)
_NO_ROWS = np.zeros((0, 0), np.float32)


def linear(
    x: np.ndarray, weight: Weight, norm: Norm | None = None, residual: np.ndarray | None = None
) -> np.ndarray:
    """residual + weight norm(x): x [rows, in] -> [rows, out]."""
    out = np.empty((len(x), weight.data.shape[0]), np.float32)
    scale, eps = (_NONE, 0.0) if norm is None else (norm.weight, norm.eps)
    residual = _NO_ROWS if residual is None else np.ascontiguousarray(residual)
    _linear(np.ascontiguousarray(x), weight.table, scale, eps, residual, out)
    return out


def embed(ids: np.ndarray, weight: Weight) -> np.ndarray:
    """Rows of the embedding: ids int [n] -> [n, hidden]."""
    out = np.empty((len(ids), weight.in_features), np.float32)
    _embed(ids, weight.table, out)
    return out


@jit
def _linear(x, w, scale, eps, residual, out):  # type: ignore[no-untyped-def]
    inputs = np.empty((x.shape[0], padded_size(w)), np.float32)
    h = np.empty(x.shape[1], np.float32)
    for row in range(x.shape[0]):
        if len(scale) > 0:
            normalize(x[row], scale, eps, h)
            lay_out(w, h, inputs[row])
        else:
            lay_out(w, x[row], inputs[row])
    multiply(w, 0, inputs, np.arange(x.shape[0]), 0, x.shape[0], out, 0)
    if len(residual) > 0:
        for row in range(x.shape[0]):
            for i in range(out.shape[1]):
                out[row, i] += residual[row, i]


@jit
def _embed(ids, w, out):  # type: ignore[no-untyped-def]
    size, group = w[SIZE], w[GROUP]
    groups = size // group * 4 if group else 0
    row = np.empty((size + STEP - 1) // STEP * STEP, np.float32)
    for n in range(len(ids)):
        at = np.int64(ids[n])
        data, skip = w[DATA] + at * w[STRIDE], at * groups
        decode_row(w[BITS], data, w[SCALES] + skip, w[BIASES] + skip, group, size, row)
        if w[BITS] == 4:  # even features first in every step
            for i in range(size):
                step = i // STEP * STEP
                out[n, i] = row[step + (i - step) // 2 + (i & 1) * (STEP // 2)]
        else:
            for i in range(size):
                out[n, i] = row[i]
