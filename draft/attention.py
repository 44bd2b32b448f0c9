"""Attention of a block's rows, each to the context and to other rows of the block.

The draft decides no token, only which ones are worth verifying. So this need not be row-invariant,
and takes whatever is fast: MLX's fused attention, or BLAS.
"""

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array, is_numpy


def attend(
    queries: Array, keys: Array, values: Array, scale: float, mask: np.ndarray | None
) -> Array:
    """softmax(scale * queries keys^T) values, grouped heads: [heads, block, dim].

    queries [heads, block, dim]; keys, values [kv_heads, rows, dim]; mask bool [block, rows], what
    each query sees (at least itself), None = everything.
    """
    if not is_numpy(queries):
        seen = None if mask is None else mx.array(mask)
        return mx.fast.scaled_dot_product_attention(
            queries[None], keys[None], values[None], scale=scale, mask=seen
        )[0]
    heads, block, dim = queries.shape
    kv_heads, rows, _ = keys.shape
    # Heads that share keys stand together, one matrix product per kv head.
    scores = queries.reshape(kv_heads, -1, dim) @ keys.swapaxes(1, 2)
    scores = scores.reshape(heads, block, rows) * np.float32(scale)
    if mask is not None:
        scores[:, ~mask] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return (scores.reshape(kv_heads, -1, rows) @ values).reshape(heads, block, dim)
