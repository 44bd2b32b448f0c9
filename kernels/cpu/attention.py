"""Attention of rows over keys given by their places in the key buffer.

A row adds its keys one by one in the order of their positions, so neither the other rows nor the
places of the keys change a bit. A prompt is a tree without branches.
"""

import math

import numpy as np

from specdec.kernels.attention import AttentionLayout
from specdec.kernels.cpu.dots import STEP, store_1x1, store_1x4
from specdec.kernels.cpu.jit import jit
from specdec.kernels.cpu.norm import sigmoid_gate
from specdec.kernels.layout import TreeLayout
from specdec.kernels.linear import Piece


def tree_attention(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    layout: AttentionLayout,
    scale: float,
    gate: Piece | None = None,
) -> np.ndarray:
    """Attention of each row over the committed keys, its ancestors and itself: [rows, heads * dim].

    queries [heads, rows, dim]; keys, values [kv_heads, capacity, dim]; as kernels.attention.
    """
    # Numba compiles strided arrays to other code, which adds in another order.
    assert all(buffer.flags.c_contiguous for buffer in (keys, values))
    heads, rows, dim = queries.shape
    out = np.empty((rows, heads * dim), np.float32)
    tree = layout.tree
    _attend(
        np.ascontiguousarray(queries),
        keys,
        values,
        layout.length,
        tree.paths,
        tree.depths,
        np.float32(scale),
        out,
    )
    if gate is None:
        return out
    gates = gate.values.reshape(rows, heads, 2 * dim)[..., dim:]
    return sigmoid_gate(out, gates.reshape(rows, heads * dim))


def prefill_attention(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    length: int,
    scale: float,
    gate: Piece | None = None,
) -> np.ndarray:
    """The same of a prompt chunk after `length` tokens: a tree without branches."""
    layout = AttentionLayout(TreeLayout.chain(queries.shape[1]), length)
    return tree_attention(queries, keys, values, layout, scale, gate)


@jit
def _attend(queries, keys, values, length, paths, depths, scale, out):  # type: ignore[no-untyped-def]
    heads, rows, dim = queries.shape
    group = heads // keys.shape[0]
    places = np.arange(length + paths.shape[1])
    scores = np.empty((len(places), 1), np.float32)
    total = np.empty(dim, np.float32)
    for row in range(rows):
        for depth in range(depths[row] + 1):
            places[length + depth] = length + paths[row, depth]
        seen = places[: length + depths[row] + 1]
        for head in range(heads):
            kv = head // group
            attend_row(
                queries[head, row : row + 1], keys[kv], values[kv], seen, scale, scores, total
            )
            for i in range(dim):
                out[row, head * dim + i] = total[i]


@jit
def attend_row(query, keys, values, places, scale, scores, total):  # type: ignore[no-untyped-def]
    """One query [1, dim] over the keys at `places`, in this order, into `total`; scores is room."""
    dim, seen = query.shape[1], len(places)
    position = 0
    if dim % STEP == 0:
        while position + 4 <= seen:
            store_1x4(query, keys, places, position, scores, 0)
            position += 4
        while position < seen:
            store_1x1(query, keys, places, position, scores, 0)
            position += 1
    else:
        for at in range(seen):
            scores[at, 0] = _dot(query[0], keys[places[at]])
    peak = np.float32(-np.inf)
    for at in range(seen):
        scores[at, 0] *= scale
        peak = max(peak, scores[at, 0])
    sum_of_weights = np.float32(0)
    for i in range(dim):
        total[i] = 0
    for at in range(seen):
        weight = np.float32(math.exp(scores[at, 0] - peak))
        sum_of_weights += weight
        value = values[places[at]]
        for i in range(dim):
            total[i] += weight * value[i]
    for i in range(dim):
        total[i] /= sum_of_weights


@jit
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total
