"""Queries, keys and values by heads: normalized, rotated."""

import numpy as np

from specdec.kernels.attention_inputs import AttentionShape
from specdec.kernels.cpu.jit import jit
from specdec.kernels.cpu.norm import normalize
from specdec.kernels.cpu.rope import turn
from specdec.kernels.linear import Piece


def attention_inputs(
    queries: Piece,
    keys: Piece,
    values: Piece,
    shape: AttentionShape,
    cos: np.ndarray,
    sin: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries [heads, rows, dim] and keys [kv_heads, rows, dim], normalized and rotated; values."""
    rows, dim = len(cos), shape.dim
    q = np.empty((shape.heads, rows, dim), np.float32)
    k, v = (np.empty((shape.kv_heads, rows, dim), np.float32) for _ in range(2))
    weights = shape.q_norm.weight, shape.k_norm.weight
    apart = 2 * dim if shape.gated else dim
    arrays = queries.rows, keys.rows, values.rows
    starts = queries.start, keys.start, values.start
    _inputs(
        *arrays, *starts, apart, *weights, shape.q_norm.eps, shape.k_norm.eps, cos, sin, q, k, v
    )
    return q, k, v


@jit
def _inputs(  # type: ignore[no-untyped-def]
    queries,
    keys,
    values,
    q_start,
    k_start,
    v_start,
    apart,
    q_norm,
    k_norm,
    q_eps,
    k_eps,
    cos,
    sin,
    q,
    k,
    v,
):
    dim = q.shape[2]
    for row in range(q.shape[1]):
        for head in range(q.shape[0]):
            at = q_start + head * apart
            normalize(queries[row, at : at + dim], q_norm, q_eps, q[head, row])
            turn(q[head, row], cos[row], sin[row])
        for head in range(k.shape[0]):
            at = k_start + head * dim
            normalize(keys[row, at : at + dim], k_norm, k_eps, k[head, row])
            turn(k[head, row], cos[row], sin[row])
            at = v_start + head * dim
            v[head, row] = values[row, at : at + dim]
