"""The launches of experts: by lanes, whatever floats and packing, or on matrix units."""

from functools import cache

import mlx.core as mx

from specdec.kernels.gpu import expert_tiles
from specdec.kernels.gpu.expert_formats import (
    HIDDEN_INPUTS,
    PACKING,
    SUM_INPUTS,
    Formats,
    Task,
    inner_of,
)
from specdec.kernels.gpu.expert_tiles import bank_on_tiles, shared_on_tiles
from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.limits import MAX_ROWS, Unsupported

MAX_TOP_K = 16
SHARING = 2  # rows that share one reading of an expert, at most
HIDDEN_SIMDGROUPS = 4  # of a threadgroup of expert_hidden
SUM_FEATURES = 8  # of a threadgroup of expert_sum
SUM_SIMDGROUPS = 8

HELPERS = ("words.h", "weights.h", "simd_sums.h", "bits.h", "entries.h", "experts.h")
EXPERT_HIDDEN = MetalKernel(
    "expert_hidden",
    inputs=("x", "norm", "eps", *HIDDEN_INPUTS),
    outputs=("hidden", "shared_hidden"),
    template=("T", *PACKING, "HIDDEN", "FEATURES", "TOP_K", "ROWS", "ROUTED", "WITH_SHARED"),
    helpers=HELPERS,
)
EXPERT_SUM = MetalKernel(
    "expert_sum",
    inputs=SUM_INPUTS,
    outputs=("out",),
    template=(
        *("T", "O", *PACKING, "TOP_K", "ROWS", "MOST"),
        *("GATE", "ROUTED", "WITH_SHARED", "APART"),
    ),
    helpers=HELPERS,
)


@cache
def launches(
    x: tuple[int, ...],
    dtype: mx.Dtype,
    norm_dtype: mx.Dtype,
    top_k: int,
    used: int,
    bank: Formats | None,
    shared: Formats | None,
    gate: tuple[int, mx.Dtype] | None,
    apart: mx.Dtype | None,
    keep_apart: bool,
    tiles: bool,
) -> tuple[Launch | None, Launch] | None:
    """The two launches; of the first there is none where no expert is computed, and neither where
    routed experts are computed on matrix units and the shared one is not, or the other way round.

    x: shape. used: entries of the union. gate: column of the shared expert's gate, dtype of its
    rows. apart: dtype. tiles: whether matrix units are wanted, tiles_on().
    """
    rows, hidden = x
    if not 1 <= rows <= MAX_ROWS:
        raise Unsupported(f"kernel expert_hidden: {rows} rows, expected 1 to {MAX_ROWS}")
    if not 1 <= top_k <= MAX_TOP_K:
        raise Unsupported(f"kernel expert_hidden: top {top_k}, expected 1 to {MAX_TOP_K}")
    if hidden % SUM_FEATURES:
        raise Unsupported(f"kernel expert_sum: {hidden} features, expected a multiple of 8")
    if apart is not None and apart != mx.float32:
        raise Unsupported(f"kernel expert_sum: outputs of {apart}, expected float32")
    for what, found in (("norm", norm_dtype), ("gate", gate[1] if gate else None)):
        if found is not None and found != dtype:
            raise Unsupported(f"kernel expert_sum: {what} of {found}, expected {dtype} as x")
    inners = inner_of(bank, dtype, hidden, "bank"), inner_of(shared, dtype, hidden, "shared expert")
    ways = {bank_on_tiles(bank, top_k)} if bank else set()
    ways |= {shared_on_tiles(shared)} if shared else set()
    if len(ways) == 2:
        return None
    column = gate[0] if gate else 0
    task = Task(rows, hidden, dtype, top_k, used, bank, shared, *inners, column, keep_apart)
    if tiles and ways == {True}:
        return expert_tiles.hidden_launch(task), expert_tiles.sum_launch(task)
    return _hidden_launch(task) if ways else None, _sum_launch(task)


def _hidden_launch(task: Task) -> Launch:
    sharing = min(task.most, SHARING)
    features = 2 if task.rows == 1 else 4  # of a simdgroup: one row alone needs more simdgroups
    blocks = -(-max(task.inner, task.shared_inner) // (features * HIDDEN_SIMDGROUPS))
    threads = 32 * HIDDEN_SIMDGROUPS
    return EXPERT_HIDDEN.launch(
        task.hidden_shapes,
        [mx.float32, mx.float32],
        grid=(blocks * threads, task.entries(sharing), 1),
        threadgroup=(threads, 1, 1),
        template={
            **task.template(0),
            "HIDDEN": task.hidden,
            "FEATURES": features,
            "ROWS": sharing,
        },
    )


def _sum_launch(task: Task) -> Launch:
    sharing = min(task.most, SHARING)
    # several rows need so many registers that 16 simdgroups might not fit
    most = 16 if task.rows == 1 else SUM_SIMDGROUPS
    threads = 32 * max(1, min(task.entries(sharing), most))
    return EXPERT_SUM.launch(
        [task.out_shape],
        [task.out_dtype],
        grid=(task.hidden // SUM_FEATURES * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        template={**task.sum_template(), "ROWS": sharing},
    )
