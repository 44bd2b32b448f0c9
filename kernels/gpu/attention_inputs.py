"""Queries, keys and values by heads on a GPU, made of projections by one launch."""

from functools import cache

import mlx.core as mx

from specdec.kernels.attention_inputs import AttentionShape, Staged, written
from specdec.kernels.gpu.in_place import in_place
from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.limits import Unsupported, check_heads
from specdec.kernels.gpu.resident import resident
from specdec.kernels.linear import Piece

INPUTS = MetalKernel(
    "attention_inputs",
    inputs=(
        "q_rows",
        "k_rows",
        "v_rows",
        "where",
        "q_weight",
        "k_weight",
        "q_eps",
        "k_eps",
        "turn_cos",
        "turn_sin",
        "kept_keys",
        "kept_values",
        "tree",
        "order",
    ),
    outputs=("queries", "keys", "values"),
    template=("T", "DIM", "STAGED"),
    helpers=("turned.h",),
    writes=("kept_keys", "kept_values"),
)


def attention_inputs(
    queries: Piece,
    keys: Piece,
    values: Piece,
    shape: AttentionShape,
    cos: mx.array,
    sin: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries T [heads, rows, dim], keys and values T [kv_heads, rows, dim]."""
    # the places of what is not used are taken by any arrays
    return _run((queries, keys, values), shape, cos, sin, (*[queries.rows] * 4,), False)


def staged_inputs(
    queries: Piece,
    keys: Piece,
    values: Piece,
    shape: AttentionShape,
    cos: mx.array,
    sin: mx.array,
    buffers: tuple[mx.array, mx.array],
    tree: mx.array,
    order: mx.array,
) -> Staged:
    pieces = queries, keys, values
    if in_place():
        found, done, _ = _run(pieces, shape, cos, sin, (*buffers, tree, order), True)
        return Staged(found, *buffers, None, done)
    found, k, v = attention_inputs(*pieces, shape, cos, sin)
    return Staged(found, *written(buffers, (k, v), tree), (k, v), order)


def _run(
    pieces: tuple[Piece, Piece, Piece],
    shape: AttentionShape,
    cos: mx.array,
    sin: mx.array,
    kept: tuple[mx.array, ...],
    staged: bool,
) -> tuple[mx.array, mx.array, mx.array]:
    """kept: buffers, tree and order."""
    q_norm, k_norm = shape.q_norm, shape.k_norm
    launch, where = _launch(
        tuple(array.dtype for array in (*(piece.rows for piece in pieces), *kept[:2])),
        (q_norm.weight.dtype, k_norm.weight.dtype),
        cos.shape,
        shape.heads,
        shape.kv_heads,
        shape.dim,
        shape.gated,
        tuple(piece.start for piece in pieces),
        staged,
    )
    q, k, v = launch(
        *(piece.rows for piece in pieces),
        where,
        q_norm.weight,
        k_norm.weight,
        q_norm.on_device,
        k_norm.on_device,
        cos,
        sin,
        *kept,
    )
    return q, k, v


@cache
def _launch(
    arrays: tuple[mx.Dtype, ...],
    weights: tuple[mx.Dtype, ...],
    angles: tuple[int, int],
    heads: int,
    kv_heads: int,
    dim: int,
    gated: bool,
    starts: tuple[int, ...],
    staged: bool,
) -> tuple[Launch, mx.array]:
    """The launch, and where in the rows what stands."""
    (rows, half), dtype = angles, arrays[0]
    check_heads("attention_inputs", {*arrays, *weights}, rows, heads, kv_heads, dim)
    if 2 * half > dim:
        raise Unsupported(f"kernel attention_inputs: {half} pairs turn, expected at most {dim} / 2")
    rest = (8,) if staged else (kv_heads, rows, dim)
    launch = INPUTS.launch(
        [(heads, rows, dim), rest, rest],
        [dtype, dtype, dtype],
        grid=(32, heads + 2 * kv_heads, rows),
        threadgroup=(32, 1, 1),
        template={"T": dtype, "DIM": dim, "STAGED": staged},
    )
    where = [*starts, 2 * dim if gated else dim, heads, kv_heads]
    return launch, resident(where, mx.int32)
