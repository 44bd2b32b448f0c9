"""Attention of a tree's rows over the committed keys and their own ancestors.

Exactness rests on one rule: a row adds its keys in blocks of BLOCK absolute positions, each block
by itself and the blocks in order, whatever the other rows are and wherever its keys lie in memory.
So the committed positions below `base` (whole blocks) are shared by all rows, and the block or two
after it are laid out for every row along its own path, padded to whole blocks with keys that weigh
exactly zero.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from specdec.kernels.layout import TreeLayout

BLOCK = 64


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """Which keys each row of one verify pass sees, the same for all layers.

    length: committed tokens.
    base: length rounded down to whole blocks.
    tail: int32 [rows, T], per row the keys from position `base` on, as indexes into
        [committed base..length | the tree's rows | one zero row]; T is a multiple of BLOCK.
    hidden: bool [rows, T], True where the tail has no key.
    """

    length: int
    base: int
    tail: mx.array
    hidden: mx.array

    @classmethod
    def of(cls, tree: TreeLayout, length: int) -> "AttentionLayout":
        base = length // BLOCK * BLOCK
        partial = length - base
        width = -(-(partial + tree.paths.shape[1]) // BLOCK) * BLOCK
        zero_row = partial + tree.rows
        tail = np.full((tree.rows, width), zero_row, np.int32)
        tail[:, :partial] = np.arange(partial)
        own = tree.paths.shape[1]
        tail[:, partial : partial + own] = np.where(tree.paths >= 0, partial + tree.paths, zero_row)
        return cls(length, base, mx.array(tail), mx.array(tail == zero_row))


def tree_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    new_keys: mx.array,
    new_values: mx.array,
    layout: AttentionLayout,
    scale: float,
) -> mx.array:
    """Softmax attention of each row over the committed keys, its ancestors and itself.

    queries [heads, rows, dim]; keys, values [kv_heads, capacity, dim], of which layout.length are
    committed; new_keys, new_values [kv_heads, rows, dim]. Returns [heads, rows, dim].
    """
    heads, rows, dim = queries.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    base, length = layout.base, layout.length
    # [kv, rows, group, dim]: the heads of a group share their keys
    grouped = (queries * scale).reshape(kv_heads, group, rows, dim).swapaxes(1, 2)

    zero = mx.zeros((kv_heads, 1, dim), keys.dtype)
    tail_keys, tail_values = (
        mx.concatenate([cache[:, base:length], new, zero], axis=1)[:, layout.tail]
        for cache, new in ((keys, new_keys), (values, new_values))
    )  # [kv, rows, T, dim]
    scores = grouped @ tail_keys.swapaxes(-1, -2)  # [kv, rows, group, T]
    scores = mx.where(layout.hidden[:, None], -mx.inf, scores.astype(mx.float32))
    peak = scores.max(axis=-1, keepdims=True)
    if base:
        flat = grouped.reshape(kv_heads, rows * group, dim)
        shared = (flat @ keys[:, :base].swapaxes(-1, -2)).astype(mx.float32)
        shared = shared.reshape(kv_heads, rows, group, base)
        peak = mx.maximum(peak, shared.max(axis=-1, keepdims=True))

    # [kv, rows, group, T] -> [kv, rows, blocks, group, BLOCK], then one product per block
    weights = mx.exp(scores - peak)
    weights = weights.reshape(kv_heads, rows, group, -1, BLOCK).swapaxes(2, 3)
    blocks = tail_values.reshape(kv_heads, rows, -1, BLOCK, dim)
    parts = _weighted(weights, blocks).transpose(0, 2, 1, 3, 4)  # [kv, blocks, rows, group, dim+1]
    if base:
        weights = mx.exp(shared - peak).reshape(kv_heads, rows * group, -1, BLOCK).swapaxes(1, 2)
        blocks = values[:, :base].reshape(kv_heads, -1, BLOCK, dim)
        first = _weighted(weights, blocks).reshape(kv_heads, -1, rows, group, dim + 1)
        parts = mx.concatenate([first, parts], axis=1)
    total = parts.sum(axis=1)  # in the order of the blocks; blocks beyond a row's last key add zero
    out = total[..., :dim] / total[..., dim:]  # [kv, rows, group, dim]
    return out.swapaxes(1, 2).reshape(heads, rows, dim).astype(queries.dtype)


def _weighted(weights: mx.array, values: mx.array) -> mx.array:
    """weights [..., n, BLOCK] times values [..., BLOCK, dim], the weights' own sum appended."""
    products = weights @ values.astype(mx.float32)
    return mx.concatenate([products, weights.sum(axis=-1, keepdims=True)], axis=-1)


def prefill_attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float
) -> mx.array:
    """Causal attention of a prompt chunk; the queries stand at the last positions of the keys.

    queries [heads, rows, dim]; keys, values [kv_heads, length, dim]. Returns [heads, rows, dim].
    """
    return mx.fast.scaled_dot_product_attention(
        queries[None], keys[None], values[None], scale=scale, mask="causal"
    )[0]
