"""Linear layers on matrix units, for large matrices: how a launch of linear_tiles is cut up.

Seven rows cost what one does there. One row of a small matrix is faster without (linear.metal),
where each simdgroup has less to wait for.
"""

import mlx.core as mx

from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.tiles import TILE_FEATURES, TILE_ROWS, groups_of

LARGE = 1 << 19  # weights of a matrix, at least
ENOUGH = 2048  # simdgroups keep a large GPU busy
MAX_SPLIT = 8  # of a row's inputs: what they leave each other fits threadgroup memory
SIMDGROUPS = 4  # of a threadgroup, at least

LINEAR_TILES = MetalKernel(
    "linear_tiles",
    inputs=("x", "data", "scales", "biases", "norm", "eps", "residual"),
    outputs=("out",),
    template=(
        *("T", "BITS", "GROUP", "TILES", "ROW_TILES"),
        *("SPLIT", "SIMDGROUPS", "UNROLL", "NORM", "RESIDUAL"),
    ),
    helpers=("words.h", "normed.h", "tiles.h"),
)


def linear_tiles(
    rows: int,
    inputs: int,
    outs: int,
    dtype: mx.Dtype,
    bits: int,
    group_size: int,
    norm: bool,
    residual: bool,
) -> Launch:
    """The launch for x [rows, inputs] and a matrix [outs, inputs] that `tiles_for` takes."""
    groups = groups_of(bits, group_size, inputs)
    split, tiles, unroll, row_tiles = _cut(groups, outs, rows)
    if group_size == 128:
        unroll = max(1, unroll // 2)  # of two steps each
    simdgroups = max(split, SIMDGROUPS)
    threads = 32 * simdgroups
    features = TILE_FEATURES * tiles * (simdgroups // split)  # of a threadgroup
    return LINEAR_TILES.launch(
        [(rows, outs)],
        [dtype],
        grid=(-(-outs // features) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        template={
            "T": dtype,
            "BITS": bits,
            "GROUP": group_size or 32,
            "TILES": tiles,
            "ROW_TILES": row_tiles,
            "SPLIT": split,
            "SIMDGROUPS": simdgroups,
            "UNROLL": unroll,
            "NORM": norm,
            "RESIDUAL": residual,
        },
    )


def _cut(groups: int, outs: int, rows: int) -> tuple[int, int, int, int]:
    """SPLIT, TILES, UNROLL, ROW_TILES. The first decides in which order a sum is added, so it must
    not depend on the rows; the others change no bits."""
    tiles = -(-outs // TILE_FEATURES)
    split = 2 if groups % 2 == 0 else 1
    while split < MAX_SPLIT and tiles * split < ENOUGH and groups % (2 * split) == 0:
        split *= 2
    blocks = -(-rows // TILE_ROWS)
    row_tiles = 1 << (blocks - 1).bit_length()
    # what an H100 has fastest, as registers allow: two tiles share what is made of x
    side = 2 if row_tiles <= 2 and tiles * split >= ENOUGH * 3 // 2 else 1
    unroll, most = 1, 1 if side == 2 or row_tiles > 2 else 2 if tiles * split >= ENOUGH // 2 else 4
    while unroll < most and groups // split % (2 * unroll) == 0:
        unroll *= 2
    return split, side, unroll, row_tiles
