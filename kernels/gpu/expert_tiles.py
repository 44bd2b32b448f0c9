"""The two launches of experts on matrix units (tiles.h), bfloat16.

What decides about bits, whether an expert's formats are taken and into how many shares a sum is
split, depends on its own formats alone: neither on rows nor on what else the launch computes.

256 experts of 512x2048, top-8 at random, take an H100 8.6 + 7.2, 31 + 19 and 53 + 31 us with 1, 7
and 16 rows here, and 9.2 + 6.0, 35 + 20 and 72 + 41 without matrix units. Reading no more than the
weights takes it 6.2 + 4.6, 22 + 13 and 41 + 23: what counts where most experts have one row is how
many instructions a code takes and how many simdgroups fit. So what is made of x alone is made
once for all experts: normed.py.
"""

from specdec.kernels.gpu.expert_formats import (
    HIDDEN_INPUTS,
    PACKING,
    SUM_INPUTS,
    Format,
    Formats,
    Task,
)
from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.limits import MAX_ROWS
from specdec.kernels.gpu.normed import MAX_INPUTS
from specdec.kernels.gpu.tiles import TILE_FEATURES, TILE_ROWS, groups_of, tiles_for

SPLIT = 4  # shares of the inputs of gate and up, at most
HIDDEN_SIMDGROUPS = 4  # of a threadgroup of expert_hidden_tiles, a multiple of SPLIT
# Of a threadgroup of expert_sum_tiles, at most. A thread takes up to 128 registers, and these
# allow 136: the compiler is the driver's, and no two need be alike.
SUM_SIMDGROUPS = 15
HIDDEN_WORDS = 32  # of weights that a lane of expert_hidden_tiles reads at once, at most
SUM_WORDS = 16
GROUPS = 4  # that it does so of, at most: of each it holds scales and biases, too
MEMORY = 32768  # bytes of a threadgroup

HELPERS = ("words.h", "normed.h", "tiles.h", "bits.h", "entries.h", "expert_tiles.h")
EXPERT_HIDDEN_TILES = MetalKernel(
    "expert_hidden_tiles",
    inputs=("normed", *HIDDEN_INPUTS),
    outputs=("hidden", "shared_hidden"),
    template=(
        *("T", *PACKING, "SPLIT", "UNROLL", "SHARED_SPLIT", "SHARED_UNROLL", "SIMDGROUPS"),
        *("HIDDEN", "TOP_K", "ROUTED", "WITH_SHARED"),
    ),
    helpers=HELPERS,
)
EXPERT_SUM_TILES = MetalKernel(
    "expert_sum_tiles",
    inputs=SUM_INPUTS,
    outputs=("out",),
    template=(
        *("T", "O", *PACKING, "UNROLL", "SHARED_UNROLL", "TOP_K", "MOST"),
        *("GATE", "ROUTED", "WITH_SHARED", "APART"),
    ),
    helpers=HELPERS,
)


def bank_on_tiles(formats: Formats, top_k: int) -> bool:
    """Whether routed experts kept so are computed here."""
    return _on_tiles(formats) and _memory(MAX_ROWS, top_k, routed=True) <= MEMORY


def shared_on_tiles(formats: Formats) -> bool:
    """Whether a shared expert kept so is computed here, for rows of up to 16 routed ones."""
    return _on_tiles(formats)


def _memory(most: int, top_k: int, routed: bool) -> int:
    """Bytes of a threadgroup of expert_sum_tiles."""
    each = top_k + 1 if routed else 1
    return 4 * most * (each * TILE_FEATURES + top_k + 1)


def _on_tiles(formats: Formats) -> bool:
    return _inputs(formats[0]) <= MAX_INPUTS and all(
        shape[-2] % TILE_FEATURES == 0 and tiles_for(floats, bits, group, _inputs(kept))
        for kept in formats
        for shape, bits, group, floats in (kept,)
    )


def _inputs(kept: Format) -> int:
    shape, bits, _, _ = kept
    return shape[-1] * 32 // bits if bits else shape[-1]


def hidden_launch(task: Task) -> Launch:
    bank, shared = task.bank, task.shared
    splits = [_split(f[0]) if f else 1 for f in (bank, shared)]
    blocks = max(
        -(-features * split // (TILE_FEATURES * HIDDEN_SIMDGROUPS))
        for features, split in zip((task.inner, task.shared_inner), splits, strict=True)
    )
    threads = 32 * HIDDEN_SIMDGROUPS
    return EXPERT_HIDDEN_TILES.launch(
        task.hidden_shapes,
        [task.dtype, task.dtype],
        grid=(blocks * threads, task.entries(TILE_ROWS), 1),
        threadgroup=(threads, 1, 1),
        template={
            **task.template(0),
            "SPLIT": splits[0],
            "UNROLL": _unroll(bank[0], splits[0], 2, HIDDEN_WORDS) if bank else 1,
            "SHARED_SPLIT": splits[1],
            "SHARED_UNROLL": _unroll(shared[0], splits[1], 2, HIDDEN_WORDS) if shared else 1,
            "SIMDGROUPS": HIDDEN_SIMDGROUPS,
            "HIDDEN": task.hidden,
        },
    )


def sum_launch(task: Task) -> Launch:
    threads = 32 * min(max(1, task.entries(TILE_ROWS)), SUM_SIMDGROUPS)
    return EXPERT_SUM_TILES.launch(
        [task.out_shape],
        [task.out_dtype],
        grid=(task.hidden // TILE_FEATURES * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        template={
            **task.sum_template(),
            "UNROLL": _unroll(task.bank[2], 1, 1, SUM_WORDS) if task.bank else 1,
            "SHARED_UNROLL": _unroll(task.shared[2], 1, 1, SUM_WORDS) if task.shared else 1,
        },
    )


def _split(kept: Format) -> int:
    """How many simdgroups share a row of weights. It decides in which order its sum is added."""
    _, bits, group, _ = kept
    groups, split = groups_of(bits, group, _inputs(kept)), 1
    while split < SPLIT and groups % (2 * split) == 0:
        split *= 2
    return split


def _unroll(kept: Format, split: int, tiles: int, most: int) -> int:
    """How many groups are read at once by a simdgroup of so many tiles, `most` words a lane; it
    changes no bits."""
    _, bits, group, _ = kept
    groups = groups_of(bits, group, _inputs(kept)) // split
    # a lane reads a quarter of two rows of each tile
    words = 2 * tiles * (group * bits // 32 if bits else 16) // 4
    unroll = 1
    while unroll < GROUPS and groups % (2 * unroll) == 0 and 2 * unroll * words <= most:
        unroll *= 2
    return unroll
