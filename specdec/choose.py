"""Choosing tokens from logits. Greedy: the most probable one, the lowest id among equals."""

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array, is_numpy


def greedy(logits: Array) -> np.ndarray:
    """logits [rows, vocab] -> int [rows]."""
    if is_numpy(logits):
        return logits.argmax(axis=-1)
    return np.array(mx.argmax(logits, axis=-1))
