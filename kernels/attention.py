"""Attention of a tree's rows over the committed keys and their own ancestors.

Exactness rests on one rule: a row adds its keys in blocks of BLOCK absolute positions, each block
by itself and the blocks in order, whatever the other rows are and wherever its keys lie in memory.
So the committed positions below `base` (whole blocks) are shared by all rows, and the block or two
after it are laid out for every row along its own path, padded to whole blocks with keys that weigh
exactly zero.
"""

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array
from specdec.kernels.executor import operation
from specdec.kernels.layout import TreeLayout
from specdec.kernels.linear import Piece
from specdec.kernels.norm import sigmoid_gate

BLOCK = 64


@dataclass(frozen=True, eq=False)
class AttentionLayout:
    """Which keys each row of one verify pass sees, the same for all layers.

    length: committed tokens; the keys of the tree's row r stand at place length + r.
    """

    tree: TreeLayout
    length: int

    @cached_property
    def on_device(self) -> dict[str, mx.array]:
        """What an executor made of this layout for its kernels, by names of its own."""
        return {}

    @property
    def base(self) -> int:
        """The committed tokens in whole blocks."""
        return self.length // BLOCK * BLOCK

    @cached_property
    def tail(self) -> tuple[mx.array, mx.array]:
        """Per row the keys from position `base` on, and which of them are none.

        int32 [rows, T], places counted from `base`, and bool [rows, T], True where there is no
        key; T is a multiple of BLOCK. No key: the place after the tree's last row.
        """
        paths, partial = self.tree.paths, self.length - self.base
        own = paths.shape[1]
        width = -(-(partial + own) // BLOCK) * BLOCK
        none = partial + self.tree.rows
        tail = np.full((self.tree.rows, width), none, np.int32)
        tail[:, :partial] = np.arange(partial)
        tail[:, partial : partial + own] = np.where(paths >= 0, partial + paths, none)
        return mx.array(tail), mx.array(tail == none)


@operation()
def tree_attention(
    queries: Array,
    keys: Array,
    values: Array,
    layout: AttentionLayout,
    scale: float,
    gate: Piece | None = None,
) -> Array:
    """Softmax attention of each row over the committed keys, its ancestors and itself.

    queries [heads, rows, dim]; keys, values [kv_heads, capacity, dim], of which layout.length are
    committed and the tree's own follow; gate: the queries' projection, if it holds output gates.
    Returns [rows, heads * dim].
    """
    heads, rows, dim = queries.shape
    kv_heads = keys.shape[0]
    group = heads // kv_heads
    base, end = layout.base, layout.length + rows
    tail, hidden = layout.tail
    # [kv, rows, group, dim]: the heads of a group share their keys
    grouped = (queries * scale).reshape(kv_heads, group, rows, dim).swapaxes(1, 2)

    zero = mx.zeros((kv_heads, 1, dim), keys.dtype)
    tail_keys, tail_values = (
        mx.concatenate([cache[:, base:end], zero], axis=1)[:, tail] for cache in (keys, values)
    )  # [kv, rows, T, dim]
    scores = grouped @ tail_keys.swapaxes(-1, -2)  # [kv, rows, group, T]
    scores = mx.where(hidden[:, None], -mx.inf, scores.astype(mx.float32))
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
    out = out.swapaxes(0, 1).reshape(rows, -1).astype(queries.dtype)
    return _gated(out, gate, dim)


def _weighted(weights: mx.array, values: mx.array) -> mx.array:
    """weights [..., n, BLOCK] times values [..., BLOCK, dim], the weights' own sum appended."""
    products = weights @ values.astype(mx.float32)
    return mx.concatenate([products, weights.sum(axis=-1, keepdims=True)], axis=-1)


@operation("never")
def prefill_attention(
    queries: Array,
    keys: Array,
    values: Array,
    length: int,
    scale: float,
    gate: Piece | None = None,
) -> Array:
    """Causal attention of a prompt chunk after `length` committed tokens.

    queries [heads, rows, dim]; keys, values [kv_heads, capacity, dim], the chunk's own from place
    `length` on; gate as in tree_attention. Returns [rows, heads * dim].
    """
    heads, rows, dim = queries.shape
    keys, values = keys[:, : length + rows], values[:, : length + rows]
    out = mx.fast.scaled_dot_product_attention(
        queries[None], keys[None], values[None], scale=scale, mask="causal"
    )[0]
    return _gated(out.swapaxes(0, 1).reshape(rows, heads * dim), gate, dim)


def _gated(out: mx.array, gate: Piece | None, dim: int) -> mx.array:
    """out [rows, heads * dim] times the sigmoid of its gates: per head dim queries, dim gates."""
    if gate is None:
        return out
    values = gate.values.reshape(out.shape[0], -1, 2 * dim)[..., dim:]
    return sigmoid_gate(out, values.reshape(out.shape))
