"""Attention of a tree's rows on a GPU: keys split into fixed blocks of positions, then merged.

A row adds its keys by absolute position: runs of 32, blocks of POSITIONS, the blocks in
order. So its bits depend neither on the other rows, nor on where its keys lie in memory, nor on how
the work is cut into threadgroups.
"""

from functools import cache, lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from specdec.kernels.attention import AttentionLayout
from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.limits import check_heads
from specdec.kernels.gpu.resident import resident
from specdec.kernels.linear import Piece

POSITIONS = 128  # of a block; the kernels count on it
LONE_ROOTS = 1024  # of which the paths are kept on the device at a time
ENOUGH = 192  # threadgroups keep a large GPU busy; beyond, heads rather share what is read

BLOCKS = MetalKernel(
    "attention_blocks",
    inputs=("queries", "keys", "values", "scale", "tree"),
    outputs=("parts", "totals"),
    template=("T", "DIM", "G", "WINDOW"),
    helpers=("attention.h",),
)
MERGE = MetalKernel(
    "attention_merge",
    inputs=("parts", "totals", "tree", "gate", "start"),
    outputs=("out",),
    template=("T", "DIM", "GATED", "WINDOW"),
)


def tree_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    layout: AttentionLayout,
    scale: float,
    gate: Piece | None = None,
) -> mx.array:
    """Softmax attention of each row over its keys, gated: T [rows, heads * dim]."""
    tree = paths(layout)
    split, merge, factor, start = _attention(
        queries.shape,
        keys.shape[0],
        (queries.dtype, keys.dtype, values.dtype),
        block_count(keys.shape[1]),
        scale,
        None if gate is None else (gate.rows.dtype, gate.start),
        False,
    )
    parts, totals = split(queries, keys, values, factor, tree)
    # the place of what is not used is taken by any array
    (out,) = merge(parts, totals, tree, queries if gate is None else gate.rows, start)
    return out


def window_attention(
    queries: mx.array, keys: mx.array, values: mx.array, seen: mx.array, blocks: int, scale: float
) -> mx.array:
    """Softmax attention of each row over a run of places: T [rows, heads * dim].

    seen: int32 [rows, 4], as kernels.block_attention says; blocks: as many hold all of them.
    """
    split, merge, factor, start = _attention(
        queries.shape,
        keys.shape[0],
        (queries.dtype, keys.dtype, values.dtype),
        blocks,
        scale,
        None,
        True,
    )
    parts, totals = split(queries, keys, values, factor, seen)
    (out,) = merge(parts, totals, seen, queries, start)
    return out


class _Attention(NamedTuple):
    """The launches of one shape, and the numbers that they read."""

    split: Launch
    merge: Launch
    scale: mx.array
    start: mx.array


@cache
def _attention(
    shape: tuple[int, int, int],
    kv_heads: int,
    dtypes: tuple[mx.Dtype, ...],
    blocks: int,
    scale: float,
    gate: tuple[mx.Dtype, int] | None,
    window: bool,
) -> _Attention:
    (heads, rows, dim), dtype = shape, dtypes[0]
    gate_dtype, start = gate or (dtype, 0)
    check_heads("attention_blocks", {*dtypes, gate_dtype}, rows, heads, kv_heads, dim)
    shared = heads_together(heads // kv_heads, kv_heads * rows * blocks)
    split = BLOCKS.launch(
        [(heads, rows, blocks, dim), (heads, rows, blocks, 2)],
        [mx.float32, mx.float32],
        grid=(POSITIONS * blocks, heads // shared, rows),
        threadgroup=(POSITIONS, 1, 1),
        template={"T": dtype, "DIM": dim, "G": shared, "WINDOW": window},
    )
    merge = MERGE.launch(
        [(rows, heads * dim)],
        [dtype],
        grid=(heads * dim, rows, 1),
        threadgroup=(dim, 1, 1),
        template={"T": dtype, "DIM": dim, "GATED": gate is not None, "WINDOW": window},
    )
    return _Attention(split, merge, resident([scale], mx.float32), resident([start], mx.int32))


def heads_together(group: int, others: int) -> int:
    """How many of the `group` heads that share keys one threadgroup takes; any number is right.

    others: threadgroups there are when it takes all of them. One that takes more reads less, but
    few threadgroups leave a GPU idle. Each number is compiled by itself, so there are few.
    """
    fitting = [n for n in (2, 3, 4, 5, 7) if group % n == 0 and others * (group // n) >= ENOUGH]
    return max(fitting, default=1)


def paths(layout: AttentionLayout) -> mx.array:
    """int32 [rows, *]: each row's position, the committed length, its path; kept with the layout.

    As wide for every tree of so many rows, and 8 columns at least, so that it never lies in Metal's
    constant space: one kernel for all.
    """
    if "paths" not in layout.on_device:
        length, tree = layout.length, layout.tree
        if tree.rows == 1:
            place = length % LONE_ROOTS
            layout.on_device["paths"] = _lone_roots(length - place)[place : place + 1]
        else:
            layout.on_device["paths"] = mx.array(path_table(layout))
    return layout.on_device["paths"]


def path_table(layout: AttentionLayout) -> np.ndarray:
    """`paths` on the host."""
    length, tree = layout.length, layout.tree
    return _table(length + tree.depths, length, tree.paths, 2 + tree.rows)


@lru_cache(maxsize=2)
def _lone_roots(length: int) -> mx.array:
    """The paths of a lone root behind `length`, length + 1, .. tokens, a row each."""
    lengths = np.arange(length, length + LONE_ROOTS, dtype=np.int32)
    return resident(_table(lengths, lengths, np.zeros((LONE_ROOTS, 1)), 3), mx.int32)


def _table(
    positions: np.ndarray, length: int | np.ndarray, paths: np.ndarray, columns: int
) -> np.ndarray:
    table = np.full((len(paths), max(8, columns)), -1, np.int32)
    table[:, 0] = positions
    table[:, 1] = length
    table[:, 2 : 2 + paths.shape[1]] = paths
    return table


def block_count(capacity: int) -> int:
    """Blocks to launch: the same for all trees over buffers of so many places. Of those behind a
    row's position, nothing is computed."""
    return rounded(-(-capacity // POSITIONS))


def rounded(blocks: int) -> int:
    """At least `blocks` and at most a quarter more, so that few numbers occur: each is a launch."""
    step = max(1, 2 ** (blocks.bit_length() - 3))
    return -(-blocks // step) * step
