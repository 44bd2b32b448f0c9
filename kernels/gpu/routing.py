"""Routing on a GPU: one launch for all rows and the union of their experts.

Where experts may run on matrix units it also makes the normed rows that they read (normed.py).
"""

from functools import cache
from typing import TypeAlias

import mlx.core as mx

from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.limits import MAX_ROWS, Unsupported
from specdec.kernels.gpu.normed import SIMDGROUPS, is_normed, normed_shape
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm
from specdec.kernels.routing import Routing

Shape: TypeAlias = tuple[int, ...]

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
        return Routing(*_launch(values.dtype, *routed)(values))
    assert x.shape[0] == values.shape[0]
    launch = _normed_launch(x.dtype, x.shape[1], *routed)
    return Routing(*launch(values, x, norm.weight, norm.on_device))


@cache
def _launch(
    dtype: mx.Dtype, rows: int, start: int, experts: int, top_k: int, normalize: bool
) -> Launch:
    threads = _threads(rows, experts, top_k)
    return ROUTE.launch(
        *_outputs(rows, experts, top_k),
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        template=_template(dtype, start, experts, top_k, normalize),
    )


@cache
def _normed_launch(
    dtype: mx.Dtype,
    inputs: int,
    rows: int,
    start: int,
    experts: int,
    top_k: int,
    normalize: bool,
) -> Launch:
    threads = max(_threads(rows, experts, top_k), 32 * SIMDGROUPS)
    shapes, dtypes = _outputs(rows, experts, top_k)
    return ROUTE_NORMED.launch(
        [*shapes, normed_shape(rows, inputs)],
        [*dtypes, mx.uint32],
        grid=((1 + rows) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        template=_template(dtype, start, experts, top_k, normalize),
    )


def _threads(rows: int, experts: int, top_k: int) -> int:
    """Of a threadgroup; Unsupported for what is not taken."""
    if not 1 <= rows <= MAX_ROWS:
        raise Unsupported(f"kernel route: {rows} rows, expected 1 to {MAX_ROWS}")
    if not 1 <= experts <= MAX_EXPERTS:
        raise Unsupported(f"kernel route: {experts} experts, expected 1 to {MAX_EXPERTS}")
    if not 1 <= top_k <= min(MAX_TOP_K, experts):
        limit = min(MAX_TOP_K, experts)
        raise Unsupported(f"kernel route: top {top_k} of {experts}, expected 1 to {limit}")
    return 32 * max(-(-experts // 32), min(rows, 16))


def _outputs(rows: int, experts: int, top_k: int) -> tuple[list[Shape], list[mx.Dtype]]:
    """Shapes and dtypes of experts, weights and union."""
    shapes: list[Shape] = [(rows, top_k), (rows, top_k), (min(rows * top_k, experts), 2)]
    return shapes, [mx.int32, mx.float32, mx.int32]


def _template(
    dtype: mx.Dtype, start: int, experts: int, top_k: int, normalize: bool
) -> dict[str, int | bool | mx.Dtype]:
    return {
        "T": dtype,
        "EXPERTS": experts,
        "TOP_K": top_k,
        "START": start,
        "NORMALIZE": normalize,
    }
