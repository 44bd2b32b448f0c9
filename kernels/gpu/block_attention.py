"""Attention of a draft's block on a GPU: the kernels of a tree's, which know no tree here."""

from functools import cache

import mlx.core as mx

from specdec.kernels.attention_inputs import AttentionShape
from specdec.kernels.gpu.attention import POSITIONS, rounded, window_attention
from specdec.kernels.gpu.in_place import in_place
from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.limits import Unsupported, check_heads
from specdec.kernels.gpu.resident import resident
from specdec.kernels.linear import Piece

BLOCK_INPUTS = MetalKernel(
    "block_inputs",
    inputs=(
        "q_rows",
        "k_rows",
        "v_rows",
        "told_k",
        "told_v",
        "where",
        "count",
        "q_weight",
        "k_weight",
        "q_eps",
        "k_eps",
        "turn_cos",
        "turn_sin",
        "kept",
        "place",
        "order",
    ),
    outputs=("queries", "rows"),
    template=("T", "DIM", "STAGED"),
    helpers=("turned.h",),
    writes=("kept",),
)


def block_inputs(
    block: tuple[Piece, Piece, Piece],
    told: tuple[Piece, Piece],
    count: mx.array,
    shape: AttentionShape,
    cos: mx.array,
    sin: mx.array,
    kept: mx.array,
    place: mx.array,
    order: mx.array,
) -> tuple[mx.array, mx.array, mx.array | None]:
    pieces, staged = (*block, *told), in_place()
    launch, where = _inputs(
        (*(piece.rows.dtype for piece in pieces), kept.dtype),
        (shape.q_norm.weight.dtype, shape.k_norm.weight.dtype),
        tuple(piece.rows.shape[0] for piece in pieces),
        cos.shape,
        (shape.heads, shape.kv_heads, shape.dim),
        tuple(piece.start for piece in pieces),
        staged,
    )
    queries, rows = launch(
        *(piece.rows for piece in pieces),
        where,
        count,
        shape.q_norm.weight,
        shape.k_norm.weight,
        shape.q_norm.on_device,
        shape.k_norm.on_device,
        cos,
        sin,
        kept,
        place,
        order,
    )
    if staged:
        return queries, kept, rows
    return queries, mx.slice_update(kept, rows, place[:1], axes=(2,)), None


def seen_attention(
    queries: mx.array, rows: mx.array, seen: mx.array, places: int, scale: float
) -> mx.array:
    blocks = min(rounded(-(-places // POSITIONS)), -(-rows.shape[2] // POSITIONS))
    # views: a number in place of a slice would copy
    keys, values = rows[:1].squeeze(0), rows[1:].squeeze(0)
    return window_attention(queries, keys, values, seen, blocks, scale)


@cache
def _inputs(
    pieces: tuple[mx.Dtype, ...],
    weights: tuple[mx.Dtype, ...],
    counts: tuple[int, ...],
    angles: tuple[int, int],
    heads: tuple[int, int, int],
    starts: tuple[int, ...],
    staged: bool,
) -> tuple[Launch, mx.array]:
    """The launch, and where in the rows what stands. heads: of queries, of keys, dimensions."""
    block, dtype, (queries, keys, dim) = counts[0], pieces[0], heads
    check_heads("block_inputs", {*pieces, *weights}, block, queries, keys, dim)
    if set(counts) != {block} or angles[0] < 2 * block or 2 * angles[1] > dim:
        raise Unsupported(f"kernel block_inputs: rows {counts}, angles {angles}, head dim {dim}")
    launch = BLOCK_INPUTS.launch(
        [(queries, block, dim), (8,) if staged else (2, keys, 2 * block, dim)],
        [dtype, dtype],
        grid=(32, queries + 4 * keys, block),
        threadgroup=(32, 1, 1),
        template={"T": dtype, "DIM": dim, "STAGED": staged},
    )
    return launch, resident([*starts, queries, keys, 0], mx.int32)
