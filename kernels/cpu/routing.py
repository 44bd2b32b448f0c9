"""Routing on NumPy arrays."""

import math

import numpy as np

from specdec.kernels.cpu.jit import jit
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm
from specdec.kernels.routing import Routing


def route(
    logits: Piece,
    top_k: int,
    normalize: bool,
    x: np.ndarray | None = None,
    norm: Norm | None = None,
) -> Routing:
    """The top_k experts of each row and their weights, as kernels.routing; x is not looked at."""
    values = np.ascontiguousarray(logits.values)
    experts = np.empty((len(values), top_k), np.int32)
    weights = np.empty((len(values), top_k), np.float32)
    _route(values, normalize, experts, weights)
    return Routing(experts, weights)


@jit
def _route(logits, normalize, experts, weights):  # type: ignore[no-untyped-def]
    rows, count = logits.shape
    top_k = experts.shape[1]
    left = np.empty(count, np.float32)
    for row in range(rows):
        for i in range(count):
            left[i] = logits[row, i]
        for k in range(top_k):
            best = 0
            for i in range(1, count):
                # the lower expert among equals; NaN before all others
                if left[i] > left[best] or (left[i] != left[i] and left[best] == left[best]):
                    best = i
            experts[row, k] = best
            weights[row, k] = left[best]
            left[best] = -np.inf
        peak = weights[row, 0]
        total = np.float32(0)
        if normalize:
            for k in range(top_k):
                total += math.exp(weights[row, k] - peak)
        else:
            for i in range(count):
                total += math.exp(logits[row, i] - peak)
        for k in range(top_k):
            weights[row, k] = math.exp(weights[row, k] - peak) / total
