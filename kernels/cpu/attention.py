"""Attention of rows over keys given by their places in the key buffer.

A row adds its keys one by one in the order of their positions, so neither the other rows nor the
places of the keys change a bit. A prompt is a tree without branches.
"""

import math

import numpy as np

from specdec.kernels.cpu.jit import jit


def attend(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    length: int,
    paths: np.ndarray,
    depths: np.ndarray,
    scale: float,
) -> np.ndarray:
    """Softmax attention of each row over the committed keys, its ancestors and itself.

    queries [heads, rows, dim]; keys, values [kv_heads, capacity, dim], the rows' own keys at
    places length + row; paths int32 [rows, depth + 1] and depths int32 [rows] as in TreeLayout.
    Returns [heads, rows, dim].
    """
    # Numba compiles strided arrays to other code, which adds in another order.
    assert all(buffer.flags.c_contiguous for buffer in (keys, values))
    queries = np.ascontiguousarray(queries)
    out = np.empty_like(queries)
    scores = np.empty(length + paths.shape[1], np.float32)
    _attend(queries, keys, values, length, paths, depths, np.float32(scale), scores, out)
    return out


@jit
def _attend(queries, keys, values, length, paths, depths, scale, scores, out):  # type: ignore[no-untyped-def]
    heads, rows, dim = queries.shape
    group = heads // keys.shape[0]
    for head in range(heads):
        kv = head // group
        for row in range(rows):
            seen = length + depths[row] + 1
            peak = np.float32(-np.inf)
            for position in range(seen):
                place = position if position < length else length + paths[row, position - length]
                score = np.float32(0)
                for i in range(dim):
                    score += queries[head, row, i] * keys[kv, place, i]
                score *= scale
                scores[position] = score
                peak = max(peak, score)
            total = np.float32(0)
            for i in range(dim):
                out[head, row, i] = 0
            for position in range(seen):
                place = position if position < length else length + paths[row, position - length]
                weight = np.float32(math.exp(scores[position] - peak))
                total += weight
                for i in range(dim):
                    out[head, row, i] += weight * values[kv, place, i]
            for i in range(dim):
                out[head, row, i] /= total
