"""Choosing tokens from logits. Greedy: the most probable one, the lowest id among equals."""

import mlx.core as mx
import numpy as np


def greedy(logits: mx.array) -> np.ndarray:
    """logits [rows, vocab] -> int [rows]."""
    return np.array(mx.argmax(logits, axis=-1))
