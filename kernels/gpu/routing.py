"""Routing on a GPU: one launch for all rows and the union of their experts.

Where experts may run on matrix units it also makes the normed rows that they read (normed.py).
"""

from functools import cache

import mlx.core as mx

from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.limits import MAX_ROWS, Unsupported
from specdec.kernels.gpu.normed import SIMDGROUPS, is_normed, normed_shape
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm
from specdec.kernels.routing import Routing

MAX_EXPERTS = 512  # a thread for each
MAX_TOP_K = 16

ROUTE = MetalKernel(
    "route",
    inputs=("logits",),
    outputs=("experts", "weights", "used"),
    template=("T", "EXPERTS", "TOP_K", "START", "NORMALIZE"),
    helpers=("order_key.h", "route.h"),
)
ROUTE_NORMED = MetalKernel(
    "route_normed",
    inputs=("logits", "x", "norm", "eps"),
    outputs=("experts", "weights", "used", "normed"),
    template=("T", "EXPERTS", "TOP_K", "START", "NORMALIZE"),
    helpers=("order_key.h", "route.h", "words.h", "normed.h"),
)


def route(
    logits: Piece,
    top_k: int,
    normalize: bool,
    x: mx.array | None = None,
    norm: Norm | None = None,
) -> Routing:
    """The top_k experts of each row, their weights, and which rows use each expert."""
    values, start, width = logits
    routed = values.shape[0], start, width, top_k, normalize
    if x is None or norm is None or not is_normed(x, norm):
        return Routing(*_launch(values.dtype, 0, *routed)(values))
    assert x.shape[0] == values.shape[0]
    launch = _launch(x.dtype, x.shape[1], *routed)
    return Routing(*launch(values, x, norm.weight, norm.on_device))


@cache
def _launch(
    dtype: mx.Dtype,
    inputs: int,
    rows: int,
    start: int,
    experts: int,
    top_k: int,
    normalize: bool,
) -> Launch:
    """inputs: of the normed rows to be made, 0 for none."""
    if not 1 <= rows <= MAX_ROWS:
        raise Unsupported(f"kernel route: {rows} rows, expected 1 to {MAX_ROWS}")
    if not 1 <= experts <= MAX_EXPERTS:
        raise Unsupported(f"kernel route: {experts} experts, expected 1 to {MAX_EXPERTS}")
    if not 1 <= top_k <= min(MAX_TOP_K, experts):
        limit = min(MAX_TOP_K, experts)
        raise Unsupported(f"kernel route: top {top_k} of {experts}, expected 1 to {limit}")
    kernel, simdgroups, groups = ROUTE, max(-(-experts // 32), min(rows, 16)), 1
    shapes: list[tuple[int, ...]] = [(rows, top_k), (rows, top_k)]
    shapes.append((min(rows * top_k, experts), 2))
    dtypes = [mx.int32, mx.float32, mx.int32]
    if inputs:
        kernel, simdgroups, groups = ROUTE_NORMED, max(simdgroups, SIMDGROUPS), 1 + rows
        shapes.append(normed_shape(rows, inputs))
        dtypes.append(mx.uint32)
    threads = 32 * simdgroups
    return kernel.launch(
        shapes,
        dtypes,
        grid=(groups * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        template={
            "T": dtype,
            "EXPERTS": experts,
            "TOP_K": top_k,
            "START": start,
            "NORMALIZE": normalize,
        },
    )
