"""The greedy walk on a GPU, so that a draft can be asked before the host knows the path."""

from functools import cache

import mlx.core as mx

from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.limits import MAX_ROWS, Unsupported
from specdec.kernels.walked import CAME

WALKED = MetalKernel(
    "walked",
    inputs=("verdict", "tree", "asked"),
    outputs=("numbers", "came"),
    template=("LAYERS", "BLOCK"),
)


def walked(
    verdict: mx.array, tree: mx.array, numbers: mx.array, layers: int, block: int
) -> tuple[mx.array, mx.array]:
    launch = _launch(verdict.shape[0], tree.shape[0], numbers.shape[0], layers, block)
    found, came = launch(verdict, tree, numbers)
    return found, came


@cache
def _launch(rows: int, tree: int, numbers: int, layers: int, block: int) -> Launch:
    if not 1 <= rows <= MAX_ROWS:
        raise Unsupported(f"kernel walked: {rows} rows, expected 1 to {MAX_ROWS}")
    count = 1 + layers + 2 * block + 4 * block * layers
    assert tree >= 2 * rows
    assert numbers > count
    return WALKED.launch(
        [(count,), (CAME + 2 * rows + tree,)],
        [mx.int32, mx.int32],
        grid=(128, 1, 1),
        threadgroup=(128, 1, 1),
        template={"LAYERS": layers, "BLOCK": block},
    )
