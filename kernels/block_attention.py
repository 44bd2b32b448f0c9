"""Attention of a draft's block: each row over a run of the keys before, in and behind it.

The draft decides no token, only which ones are worth verifying. So this need not be row-invariant,
and takes MLX's fused attention where there is MLX.
"""

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array, OnCpu, is_numpy

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
