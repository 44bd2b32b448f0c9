"""Attention of rows over committed keys and their own ancestors.

A row's scores are dot products (dots.py), and it adds values one by one in the order of positions,
so neither the other rows nor the places of the keys change a bit. A prompt is a tree without
branches.
"""

import numpy as np

from specdec.kernels.attention import AttentionLayout
from specdec.kernels.cpu.decode import address, aligned
from specdec.kernels.cpu.dots import STEP
from specdec.kernels.cpu.exp import exp, sigmoid
from specdec.kernels.cpu.jit import jit
from specdec.kernels.cpu.products import BITS, DATA, MOST, OUT, SIZE, STRIDE, multiply, products
from specdec.kernels.cpu.team import TEAM, share, take
from specdec.kernels.cpu.vectors import weigh
from specdec.kernels.layout import TreeLayout
from specdec.kernels.linear import Piece

_NO_GATES = np.zeros((0, 0), np.float32)


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
    tree, length = layout.tree, layout.length
    gates, column = (_NO_GATES, 0) if gate is None else (gate.rows, gate.start)
    first, last = np.zeros(rows, np.int64), np.full(rows, length)
    whole = np.ascontiguousarray(queries), keys, values, first, last
    attend(
        TEAM.place,
        products(),
        *whole,
        length,
        tree.paths,
        tree.depths,
        np.float32(scale),
        gates,
        column,
        out,
    )
    return out


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
def attend(  # type: ignore[no-untyped-def]
    team, code, queries, keys, values, first, last, own, paths, depths, scale, gates, column, out
):
    """Each row over the places first to last - 1, then over own + paths[row, : depths[row] + 1].

    Paths ascend and hold no row above the row itself. gates: for each head `dim` columns from
    `column` on that are not looked at, then its gates; or no rows.
    """
    heads, rows, dim = queries.shape
    kv_heads = keys.shape[0]
    padded = (dim + STEP - 1) // STEP * STEP
    places = own + rows if paths.shape[1] else 0
    for row in range(rows):
        places = max(places, last[row])
    if dim < padded:
        wide = np.zeros((kv_heads, places, padded), np.float32)
        wide[:, :, :dim] = keys[:, :places]
        keys = wide
    tile = max(1, MOST // (heads // kv_heads))  # rows whose queries are one block of products
    tiles = (rows + tile - 1) // tile
    seen = first, last, own, paths, depths, places
    whole = queries, keys, values, *seen, scale, gates, column, out
    # From the last tile on, which sees most.
    share(team, kv_heads * tiles, _attend_tiles, (code, *whole, tile))


@jit
def _attend_tiles(  # type: ignore[no-untyped-def]
    left,
    part,
    code,
    queries,
    keys,
    values,
    first,
    last,
    own,
    paths,
    depths,
    places,
    scale,
    gates,
    column,
    out,
    tile,
):
    """Tiles of rows over one head's keys each."""
    heads, rows, dim = queries.shape
    kv_heads, _, padded = keys.shape
    group = heads // kv_heads
    scaled = aligned(tile * group, padded)
    scaled[:] = 0
    scores = np.empty((tile * group, places), np.float32)
    total, sources = np.empty(dim, np.float32), np.arange(tile * group)
    # The keys as a Weight's table.
    matrix = np.zeros(8, np.int64)
    matrix[BITS], matrix[SIZE], matrix[STRIDE] = 32, padded, keys.strides[1]
    done = 0
    while part >= 0:
        kv, start = part % kv_heads, part // kv_heads * tile
        stop = min(start + tile, rows)
        width = (stop - start) * group
        for row in range(start, stop):
            for h in range(group):
                query, to = queries[kv * group + h, row], scaled[(row - start) * group + h]
                for i in range(dim):
                    to[i] = query[i] * scale
        seen = own + stop if paths.shape[1] else places
        matrix[DATA], matrix[OUT] = address(keys) + kv * keys.strides[0], seen
        multiply(code, matrix, 0, scaled, sources[:width], scores, 0, seen)
        for row in range(start, stop):
            for h in range(group):
                head = kv * group + h
                weights = scores[(row - start) * group + h]
                count = last[row] - first[row]
                path = paths[row, : depths[row] + 1]
                for d in range(len(path)):
                    weights[last[row] + d] = weights[own + path[d]]
                weights = weights[first[row] : last[row] + len(path)]
                peak = weights[0]
                for at in range(len(weights)):
                    peak = max(peak, weights[at])
                for at in range(len(weights)):
                    weights[at] = exp(weights[at] - peak)
                sum_of_weights = np.float32(0)
                for at in range(len(weights)):
                    sum_of_weights += weights[at]
                for i in range(dim):
                    total[i] = 0
                weigh(values[kv], first[row], weights, 0, count, total)
                for d in range(len(path)):
                    weigh(values[kv], own + path[d], weights, count + d, 1, total)
                share_of_one = 1 / sum_of_weights
                to = out[row, head * dim : (head + 1) * dim]
                if len(gates) > 0:
                    at = column + (2 * head + 1) * dim
                    gate = gates[row, at : at + dim]
                    for i in range(dim):
                        to[i] = total[i] * share_of_one * sigmoid(gate[i])
                else:
                    for i in range(dim):
                        to[i] = total[i] * share_of_one
        part = take(left)
        done += 1
    return done
