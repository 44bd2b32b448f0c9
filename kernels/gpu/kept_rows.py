"""An accepted path's keys and values, moved to where they count within their buffers."""

from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.limits import check_heads

LAYERS = 8  # of one launch

BUFFERS = tuple(f"{of}{i}" for i in range(LAYERS) for of in ("keys", "values"))
KEPT_ROWS = MetalKernel(
    "kept_rows",
    inputs=("path", "tree", *BUFFERS, "order"),
    outputs=("done",),
    template=("T", "DIM"),
    writes=BUFFERS,
)


def kept_rows(
    keys: Sequence[mx.array],
    values: Sequence[mx.array],
    path: mx.array,
    tree: mx.array,
    order: mx.array,
) -> mx.array:
    """Have the rows of a path stand side by side from where row 0 does, in each layer's buffers
    T [kv_heads, capacity, dim]. What comes after takes the result as `order` (kernels.written).

    path int32: how many rows, then which, each above the one before; tree int32 [rows, *]: its
    paths, column 1 the place of row 0.
    """
    for first in range(0, len(keys), LAYERS):
        pairs = list(zip(keys[first : first + LAYERS], values[first : first + LAYERS], strict=True))
        launch = _launch(pairs[0][0].dtype, pairs[0][0].shape[0], pairs[0][0].shape[2], len(pairs))
        absent = pairs[:1] * (LAYERS - len(pairs))
        (order,) = launch(path, tree, *(one for pair in pairs + absent for one in pair), order)
    return order


@cache
def _launch(dtype: mx.Dtype, kv_heads: int, dim: int, layers: int) -> Launch:
    check_heads("kept_rows", {dtype}, 1, kv_heads, kv_heads, dim)
    return KEPT_ROWS.launch(
        [(8,)],
        [dtype],
        grid=(dim, 2 * kv_heads, layers),
        threadgroup=(dim, 1, 1),
        template={"T": dtype, "DIM": dim},
    )
