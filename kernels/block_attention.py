"""Attention of a draft's block: each row over a run of the keys before, in and behind it.

The draft decides no token, only which ones are worth verifying. So this need not be row-invariant,
and takes MLX's fused attention where there is MLX.
"""

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array, OnCpu, is_numpy
from specdec.kernels.attention_inputs import AttentionShape
from specdec.kernels.executor import operation
from specdec.kernels.linear import Piece
from specdec.kernels.rope import rotate

cpu = OnCpu("block_attention")


def block_attention(
    queries: Array, keys: Array, values: Array, first: np.ndarray, last: np.ndarray, scale: float
) -> Array:
    """Softmax attention of each row over its keys, grouped heads: [heads, rows, dim].

    queries [heads, rows, dim]; keys, values [kv_heads, capacity, dim]; first, last int [rows]:
    row i sees the places first[i] to last[i] - 1, at least one.
    """
    assert (first < last).all()
    if is_numpy(queries):
        return cpu.block_attention(queries, keys, values, first, last, scale)
    # On CUDA a plan is made for each new number of keys, in ten times the time of using it: there
    # the whole buffer is looked at, which grows by steps, and what lies behind is masked.
    places = keys.shape[1] if mx.default_device() == mx.gpu else int(last.max())
    keys, values = keys[:, :places], values[:, :places]
    mask = None
    if first.any() or (last < places).any():
        place = np.arange(places)
        mask = mx.array((place >= first[:, None]) & (place < last[:, None]))
    return mx.fast.scaled_dot_product_attention(
        queries[None], keys[None], values[None], scale=scale, mask=mask
    )[0]


@operation()
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
    """What a layer makes of a block and of the rows told before it, as one graph for any number.

    block: queries, keys and values of its rows; told: keys and values of as many rows, of which
    the first count[0] count (int32). cos, sin float32 [2 * block or more, half]: of the first told
    row's position and those that follow. kept [2, kv_heads, capacity, dim]: keys and values, into
    which those of the told rows that count, then of the block, then zeros are written from place[0]
    (int32) on, 2 * block in all; order: see kernels.written.

    Returns queries [heads, block, dim], normalized and rotated, as keys are; the buffer; and, of a
    kernel that wrote in place, what is to be `order` for the next.
    """
    rows, dim, real = block[0].rows.shape[0], shape.dim, count[:1]
    behind = mx.arange(rows) + real
    q = block[0].values.reshape(rows, shape.heads, -1)[..., :dim]
    q = rotate(shape.q_norm(q).swapaxes(0, 1), cos[behind], sin[behind])
    turns = (cos[:rows], sin[:rows]), (cos[behind], sin[behind])
    keys, values = (
        [piece.values.reshape(rows, shape.kv_heads, dim).swapaxes(0, 1) for piece in pieces]
        for pieces in ((told[0], block[1]), (told[1], block[2]))
    )
    keys = [rotate(shape.k_norm(k), *turn) for k, turn in zip(keys, turns, strict=True)]
    at = mx.arange(2 * rows)
    source = mx.where(at < real, at, mx.minimum(rows + at - real, 2 * rows - 1))
    new = mx.stack([mx.concatenate(keys, axis=1), mx.concatenate(values, axis=1)])[:, :, source]
    new = mx.where((at < real + rows)[:, None], new, mx.zeros((), new.dtype))
    return q, mx.slice_update(kept, new, place[:1], axes=(2,)), None


@operation()
def seen_attention(
    queries: mx.array, rows: mx.array, seen: mx.array, places: int, scale: float
) -> mx.array:
    """Softmax attention of each row over a run of places: [rows, heads * dim].

    queries [heads, rows, dim]; rows [2, kv_heads, capacity, dim], keys and values; seen int32
    [rows, 4]: the last place that a row sees, one more, the first, 0; places: more than any of
    them.
    """
    place = mx.arange(rows.shape[2])
    mask = (place <= seen[:, :1]) & (place >= seen[:, 2:3])
    out = mx.fast.scaled_dot_product_attention(
        queries[None], rows[0][None], rows[1][None], scale=scale, mask=mask
    )[0]
    return out.swapaxes(0, 1).reshape(queries.shape[1], -1)
