"""Quantized and dense linear layers for a few rows, with the norm before and the residual after."""

import numpy as np

from specdec.kernels.cpu.decode import aligned, decode_row
from specdec.kernels.cpu.dots import STEP
from specdec.kernels.cpu.jit import jit
from specdec.kernels.cpu.norm import normalize
from specdec.kernels.cpu.products import (
    BIASES,
    BITS,
    DATA,
    GROUP,
    LINE,
    OUT,
    SCALES,
    SIZE,
    STRIDE,
    lay_out,
    multiply,
    padded_size,
    part_width,
    products,
)
from specdec.kernels.cpu.team import TEAM, share, take
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
    _linear(
        TEAM.place, products(), np.ascontiguousarray(x), weight.table, scale, eps, residual, out
    )
    return out


def embed(ids: np.ndarray, weight: Weight) -> np.ndarray:
    """Rows of the embedding: ids int [n] -> [n, hidden]."""
    out = np.empty((len(ids), weight.in_features), np.float32)
    _embed(ids, weight.table, out)
    return out


@jit
def _linear(team, code, x, w, scale, eps, residual, out):  # type: ignore[no-untyped-def]
    width = part_width(w[OUT], w[SIZE], x.shape[0], LINE) if team else w[OUT]
    parts = (w[OUT] + width - 1) // width
    share(team, parts, _features, (code, x, w, scale, eps, residual, out, width))


@jit
def _features(left, part, code, x, w, scale, eps, residual, out, width):  # type: ignore[no-untyped-def]
    """Parts of the products: `width` output features of all rows."""
    rows = x.shape[0]
    inputs, h = aligned(rows, padded_size(w)), np.empty(x.shape[1], np.float32)
    sources = np.arange(rows)
    for row in range(rows):
        if len(scale) > 0:
            normalize(x[row], scale, eps, h)
            lay_out(w, h, inputs[row])
        else:
            lay_out(w, x[row], inputs[row])
    done = 0
    while part >= 0:
        start = part * width
        stop = min(start + width, w[OUT])
        multiply(code, w, 0, inputs, sources, out, start, stop)
        if len(residual) > 0:
            for row in range(rows):
                for i in range(start, stop):
                    out[row, i] += residual[row, i]
        part = take(left)
        done += 1
    return done


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
