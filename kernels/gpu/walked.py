"""The greedy walk on a GPU, so that a draft can be asked before the host knows the path."""

from functools import cache

import mlx.core as mx

from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.limits import MAX_ROWS, Unsupported

WALKED = MetalKernel(
    "walked", inputs=("verdict", "asked"), outputs=("numbers",), template=("LAYERS", "BLOCK")
)


def walked(verdict: mx.array, asked: mx.array, layers: int, block: int) -> mx.array:
    (numbers,) = _launch(verdict.shape[0], asked.shape[0], layers, block)(verdict, asked)
    return numbers


@cache
def _launch(rows: int, asked: int, layers: int, block: int) -> Launch:
    if not 1 <= rows <= MAX_ROWS:
        raise Unsupported(f"kernel walked: {rows} rows, expected 1 to {MAX_ROWS}")
    count = 1 + layers + 2 * block + 4 * block * layers
    assert asked == 2 * rows + count
    return WALKED.launch(
        [(count,)],
        [mx.int32],
        grid=(128, 1, 1),
        threadgroup=(128, 1, 1),
        template={"LAYERS": layers, "BLOCK": block},
    )
