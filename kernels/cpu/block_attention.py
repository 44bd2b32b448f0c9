"""Attention of a draft's block on NumPy arrays.

BLAS would do it in less time on an idle machine and in ten times more on a busy one, where its
threads wait for each other.
"""

import math

import numpy as np

from specdec.kernels.cpu.jit import jit


def block_attention(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    scale: float,
) -> np.ndarray:
    """As kernels.block_attention; fast where keys and values are whole buffers."""
    heads, rows, _ = queries.shape
    queries = np.ascontiguousarray(queries)
    out = np.zeros_like(queries)
    scores = np.empty((heads, rows, int(last.max())), np.float32)
    _attend(queries, keys, values, first, last, np.float32(scale), scores, out)
    return out


@jit
def _attend(queries, keys, values, first, last, scale, scores, out):  # type: ignore[no-untyped-def]
    heads, rows, dim = queries.shape
    places = scores.shape[2]
    group = heads // keys.shape[0]
    # All the rows at one key before the next: a key is fetched once.
    for kv in range(keys.shape[0]):
        for place in range(places):
            for head in range(kv * group, (kv + 1) * group):
                for row in range(rows):
                    score = np.float32(0)
                    for i in range(dim):
                        score += queries[head, row, i] * keys[kv, place, i]
                    seen = first[row] <= place < last[row]
                    scores[head, row, place] = score * scale if seen else np.float32(-np.inf)
    for head in range(heads):
        for row in range(rows):
            peak = np.float32(-np.inf)
            for place in range(places):
                peak = max(peak, scores[head, row, place])
            total = np.float32(0)
            for place in range(places):
                weight = math.exp(scores[head, row, place] - peak)
                scores[head, row, place] = weight
                total += weight
            for place in range(places):
                scores[head, row, place] /= total
    for kv in range(keys.shape[0]):
        for place in range(places):
            for head in range(kv * group, (kv + 1) * group):
                for row in range(rows):
                    weight = scores[head, row, place]
                    for i in range(dim):
                        out[head, row, i] += weight * values[kv, place, i]
