"""What attention works on: queries, keys and values by heads, made of a layer's projections."""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from specdec.kernels.array import Array
from specdec.kernels.executor import operation
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm
from specdec.kernels.rope import rotate


@dataclass(frozen=True, eq=False)
class AttentionShape:
    """What the projections of a layer hold.

    Queries [rows, heads, dim], or with `gated` [rows, heads, 2 * dim]: for each head its query,
    then the gate of its output; keys and values [rows, kv_heads, dim].
    """

    heads: int
    kv_heads: int
    dim: int
    gated: bool
    q_norm: Norm
    k_norm: Norm


@operation("few rows")
def attention_inputs(
    queries: Piece, keys: Piece, values: Piece, shape: AttentionShape, cos: Array, sin: Array
) -> tuple[Array, Array, Array]:
    """Queries [heads, rows, dim] and keys [kv_heads, rows, dim], normalized and rotated; values.

    cos, sin float32 [rows, half] turn the first 2 * half dimensions (see kernels.rope).
    """
    rows, dim = cos.shape[0], shape.dim
    q = queries.values.reshape(rows, shape.heads, -1)[..., :dim]
    k, v = (piece.values.reshape(rows, shape.kv_heads, dim) for piece in (keys, values))
    q, k = (
        rotate(norm(x).swapaxes(0, 1), cos, sin)
        for norm, x in ((shape.q_norm, q), (shape.k_norm, k))
    )
    return q, k, v.swapaxes(0, 1)


class Staged(NamedTuple):
    """queries [heads, rows, dim]; keys, values: the buffers with the rows' own.

    rows: their keys and values [kv_heads, rows, dim], None where they were written in place. done:
    what an operation that is to come after the writing takes as `order`.
    """

    queries: mx.array
    keys: mx.array
    values: mx.array
    rows: tuple[mx.array, mx.array] | None
    done: mx.array


@operation("few rows")
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
    """`attention_inputs`, and keys and values written into buffers behind the committed ones.

    buffers: keys and values [kv_heads, capacity, dim]; tree int32 [rows, *], column 1 the committed
    length; order [8] in the rows' dtype: see kernels.written.
    """
    q, k, v = attention_inputs(queries, keys, values, shape, cos, sin)
    return Staged(q, *written(buffers, (k, v), tree), (k, v), order)


def written(
    buffers: tuple[mx.array, mx.array], rows: tuple[mx.array, mx.array], tree: mx.array
) -> tuple[mx.array, mx.array]:
    """The buffers with these rows behind the committed ones."""
    first = tree[0, 1:2]
    keys, values = (
        mx.slice_update(buffer, new, first, axes=(1,))
        for buffer, new in zip(buffers, rows, strict=True)
    )
    return keys, values
