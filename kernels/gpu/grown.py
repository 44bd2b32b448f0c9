"""A drafted block grown to a tree on a GPU, so that its verify pass is begun before the host has
read the block."""

from functools import cache
from typing import NamedTuple

import mlx.core as mx

from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.limits import MAX_ROWS, Unsupported

NO_CHANCE = -1e29  # weights below it are finite in grown.metal alone

GROWN = MetalKernel(
    "grown",
    inputs=("found", "came", "cos", "sin"),
    outputs=("tokens", "tree", "paths", "program", "turn_cos", "turn_sin"),
    template=("ROWS", "COLUMNS", "SLOTS", "WIDTH", "TAPS"),
    helpers=("bits.h",),
)


class Grown(NamedTuple):
    """tokens int32 [rows]; tree int32 [3 * rows + 1]: tokens, parents, the bits of float32 weights,
    whether the draft's logits are finite; paths, program: as attention.paths and tree_program;
    turn: cos and sin of the rows' positions, float32 [rows, half] each."""

    tokens: mx.array
    tree: mx.array
    paths: mx.array
    program: mx.array
    turn: tuple[mx.array, mx.array]


def grown(
    found: mx.array,
    came: mx.array,
    turn: tuple[mx.array, mx.array],
    rows: int,
    taps: int,
) -> Grown:
    """The best-first tree of so many rows under a bonus token, with all that kernels read of it.

    found: int32 [slots, 2 * width + 3], as kernels.top_tokens, width rows - 1 or more; came: int32
    [CAME], of the round before, as kernels.walked; turn: cos and sin of the position where that
    round began and those that follow, [slots + 1 and one for each row of its path, half]; taps: of
    the convolution of gated delta layers, 0 without such layers. Of paths of equal weight any is
    taken first.
    """
    cos, sin = turn
    launch = _launch(found.shape, cos.shape, rows, taps)
    tokens, tree, paths, program, turn_cos, turn_sin = launch(found, came, cos, sin)
    return Grown(tokens, tree, paths, program, (turn_cos, turn_sin))


@cache
def _launch(found: tuple[int, int], angles: tuple[int, int], rows: int, taps: int) -> Launch:
    slots, width, columns = found[0], (found[1] - 3) // 2, max(8, 2 + rows)
    if not 2 <= rows <= MAX_ROWS or width < rows - 1 or not 1 <= slots < MAX_ROWS:
        raise Unsupported(
            f"kernel grown: {rows} rows of {slots} slots of {width} candidates, expected 2 to "
            f"{MAX_ROWS}, at most {MAX_ROWS - 1}, and a candidate for each row but the root"
        )
    assert angles[0] > slots
    return GROWN.launch(
        [
            (rows,),
            (3 * rows + 1,),
            (rows, columns),
            (1 + rows * (4 + taps),),
            (rows, angles[1]),
            (rows, angles[1]),
        ],
        [mx.int32] * 4 + [mx.float32] * 2,
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
        template={"ROWS": rows, "COLUMNS": columns, "SLOTS": slots, "WIDTH": width, "TAPS": taps},
    )
