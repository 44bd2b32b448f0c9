"""Attention of a draft's block on NumPy arrays.

BLAS would do it in less time on an idle machine and in ten times more on a busy one, where its
threads wait for each other.
"""

import numpy as np

from specdec.kernels.cpu.attention import attend_row
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
    queries = np.ascontiguousarray(queries)
    keys, values = np.ascontiguousarray(keys), np.ascontiguousarray(values)
    out = np.empty_like(queries)
    _attend(queries, keys, values, first, last, np.float32(scale), out)
    return out


@jit
def _attend(queries, keys, values, first, last, scale, out):  # type: ignore[no-untyped-def]
    heads, rows, dim = queries.shape
    group = heads // keys.shape[0]
    places = np.arange(keys.shape[1])
    scores = np.empty((len(places), 1), np.float32)
    total = np.empty(dim, np.float32)
    for head in range(heads):
        kv = head // group
        for row in range(rows):
            seen = places[first[row] : last[row]]
            attend_row(
                queries[head, row : row + 1], keys[kv], values[kv], seen, scale, scores, total
            )
            for i in range(dim):
                out[head, row, i] = total[i]
