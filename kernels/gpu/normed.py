"""Normed rows: x as `expert_hidden_tiles` reads it, normed once for all experts (normed.h).

Products of a row with many matrices would each multiply it with the norm's weight and sum it up
again: a quarter of their instructions. `route_normed` (routing.py) makes normed rows beside the
routing; `normed_rows` alone, where there was none.
"""

from functools import cache

import mlx.core as mx

from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.tiles import tiles_for
from specdec.kernels.norm import Norm

MAX_INPUTS = 32768
SIMDGROUPS = 8  # of a threadgroup, which takes a row

NORMED_ROWS = MetalKernel(
    "normed_rows",
    inputs=("x", "norm", "eps"),
    outputs=("normed",),
    template=("T",),
    helpers=("words.h", "normed.h"),
)


def normed_shape(rows: int, inputs: int) -> tuple[int, int]:
    """Of the normed rows of x [rows, inputs], uint32."""
    return rows, inputs // 2 + (inputs // 32 + 4) // 4 * 4


def is_normed(x: mx.array, norm: Norm) -> bool:
    """Whether experts may read normed rows of x [rows, inputs]."""
    inputs = x.shape[1]
    return (
        norm.weight.dtype == x.dtype and inputs <= MAX_INPUTS and tiles_for(x.dtype, 0, 0, inputs)
    )


def normed_rows(x: mx.array, norm: Norm) -> mx.array:
    """The normed rows of x bfloat16 [rows, inputs], which `is_normed`: uint32 `normed_shape`."""
    (normed,) = _launch(x.dtype, x.shape)(x, norm.weight, norm.on_device)
    return normed


@cache
def _launch(dtype: mx.Dtype, shape: tuple[int, int]) -> Launch:
    threads = 32 * SIMDGROUPS
    return NORMED_ROWS.launch(
        [normed_shape(*shape)],
        [mx.uint32],
        grid=(shape[0] * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        template={"T": dtype},
    )
