"""Routing on a GPU: one launch for all rows and the union of their experts."""

from functools import cache

import mlx.core as mx

from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.limits import MAX_ROWS, Unsupported
from specdec.kernels.linear import Piece
from specdec.kernels.routing import Routing

MAX_EXPERTS = 512  # a thread for each
MAX_TOP_K = 16

ROUTE = MetalKernel(
    "route",
    inputs=("logits",),
    outputs=("experts", "weights", "used"),
    template=("T", "EXPERTS", "TOP_K", "START", "NORMALIZE"),
    helpers=("order_key.h",),
)


def route(logits: Piece, top_k: int, normalize: bool) -> Routing:
    """The top_k experts of each row, their weights, and which rows use each expert."""
    values, start, width = logits
    rows = values.shape[0]
    experts, weights, used = _launch(values.dtype, rows, start, width, top_k, normalize)(values)
    return Routing(experts, weights, used)


@cache
def _launch(
    dtype: mx.Dtype, rows: int, start: int, experts: int, top_k: int, normalize: bool
) -> Launch:
    if not 1 <= rows <= MAX_ROWS:
        raise Unsupported(f"kernel route: {rows} rows, expected 1 to {MAX_ROWS}")
    if not 1 <= experts <= MAX_EXPERTS:
        raise Unsupported(f"kernel route: {experts} experts, expected 1 to {MAX_EXPERTS}")
    if not 1 <= top_k <= min(MAX_TOP_K, experts):
        limit = min(MAX_TOP_K, experts)
        raise Unsupported(f"kernel route: top {top_k} of {experts}, expected 1 to {limit}")
    simdgroups = max(-(-experts // 32), min(rows, 16))
    threads = (32 * simdgroups, 1, 1)
    return ROUTE.launch(
        [(rows, top_k), (rows, top_k), (min(rows * top_k, experts), 2)],
        [mx.int32, mx.float32, mx.int32],
        grid=threads,
        threadgroup=threads,
        template={
            "T": dtype,
            "EXPERTS": experts,
            "TOP_K": top_k,
            "START": start,
            "NORMALIZE": normalize,
        },
    )
