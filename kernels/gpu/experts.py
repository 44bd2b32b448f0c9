"""The feed-forward of a layer with experts on a GPU, in two launches.

`expert_hidden` computes what stands between an expert's matrices, `expert_sum` the rest. An expert
that several rows use is read once, and the shared expert is one more that all rows use. Neither the
other rows nor the slots of a bank change a bit of a row.
"""

from functools import cache
from typing import TypeAlias

import mlx.core as mx

from specdec.kernels.experts import ExpertWeights, SharedExpert
from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.limits import GROUPS, MAX_ROWS, PACKED, Unsupported
from specdec.kernels.gpu.resident import resident
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm
from specdec.kernels.routing import Routing
from specdec.kernels.weight import Weight

MAX_TOP_K = 16
TILE_ROWS = 2  # rows that share one reading of an expert, at most
HIDDEN_SIMDGROUPS = 4  # of a threadgroup of expert_hidden
SUM_FEATURES = 8  # of a threadgroup of expert_sum
SUM_SIMDGROUPS = 8
UNUSED = (8,)  # shape of an output that is not written; kernels load from arrays of 8 elements


# of a weight: shape of its data, bits, group size, dtype of its floats
Format: TypeAlias = tuple[tuple[int, ...], int, int, mx.Dtype]
Formats: TypeAlias = tuple[Format, Format, Format]  # of gate, up, down


def _matrix(name: str) -> tuple[str, str, str]:
    return name, f"{name}_scales", f"{name}_biases"


PACKING = ("BITS", "GROUP", "INNER", "SHARED_BITS", "SHARED_GROUP", "SHARED_INNER")
HELPERS = ("weights.h", "simd_sums.h", "experts.h")
EXPERT_HIDDEN = MetalKernel(
    "expert_hidden",
    inputs=(
        *("x", "norm", "eps"),
        *(*_matrix("gate"), *_matrix("up")),
        *(*_matrix("shared_gate"), *_matrix("shared_up")),
        *("used", "experts", "table"),
    ),
    outputs=("hidden", "shared_hidden"),
    template=("T", *PACKING, "HIDDEN", "FEATURES", "TOP_K", "ROWS", "ROUTED", "WITH_SHARED"),
    helpers=HELPERS,
)
EXPERT_SUM = MetalKernel(
    "expert_sum",
    inputs=(
        *("x", "hidden", "shared_hidden"),
        *(*_matrix("down"), *_matrix("shared_down")),
        *("used", "experts", "table", "factors", "gate", "apart"),
    ),
    outputs=("out",),
    template=(
        *("T", "O", *PACKING, "TOP_K", "ROWS", "MOST"),
        *("GATE", "ROUTED", "WITH_SHARED", "APART"),
    ),
    helpers=HELPERS,
)


def feed_forward(
    x: mx.array,
    norm: Norm,
    bank: ExpertWeights,
    routing: Routing,
    table: mx.array,
    shared: SharedExpert | None = None,
    shared_gate: Piece | None = None,
) -> mx.array:
    """x plus the weighted sum of the experts' outputs for norm(x): T [rows, hidden]."""
    return _run(x, norm, bank, routing, table, shared, shared_gate)


def experts_apart(
    x: mx.array, norm: Norm, bank: ExpertWeights, routing: Routing, table: mx.array
) -> mx.array:
    """The experts' outputs, not weighted: float32 [rows, top_k, hidden]; 0 where table says -1."""
    return _run(x, norm, bank, routing, table, keep_apart=True)


def shared_hidden(x: mx.array, norm: Norm, shared: SharedExpert) -> mx.array:
    """What stands between the shared expert's matrices: float32 [rows, intermediate]."""
    formats = None, _formats(shared), None, None
    launch, _ = _launches(x.shape, x.dtype, norm.weight.dtype, 1, 0, *formats, False)
    assert launch is not None
    gates, ups, _ = _arrays(shared)
    absent, no_numbers = (x, x, x), (_numbers(),) * 3
    _, hidden = launch(x, norm.weight, norm.on_device, *absent, *absent, *gates, *ups, *no_numbers)
    return hidden


@cache
def _numbers() -> mx.array:
    """In the place of indexes that are not used; CUDA compiles what is done with them."""
    return resident([], mx.int32)


def combine(
    x: mx.array,
    apart: mx.array,
    routing: Routing,
    shared: SharedExpert | None = None,
    hidden: mx.array | None = None,
    shared_gate: Piece | None = None,
) -> mx.array:
    """The bits of `feed_forward`, from what the two above gave: T [rows, hidden]."""
    return _run(x, None, None, routing, routing.experts, shared, shared_gate, apart, hidden)


def _run(
    x: mx.array,
    norm: Norm | None,
    bank: ExpertWeights | None,
    routing: Routing,
    table: mx.array,
    shared: SharedExpert | None = None,
    gate: Piece | None = None,
    apart: mx.array | None = None,
    alone: mx.array | None = None,
    keep_apart: bool = False,
) -> mx.array:
    """apart, alone: what experts_apart and shared_hidden gave; without a norm these are all."""
    experts, used = routing.experts, routing.union
    if bank is None:
        used = experts
    elif used is None:
        raise Unsupported("kernel expert_hidden: a routing without union, expected the kernel's")
    hidden_launch, sum_launch = _launches(
        x.shape,
        x.dtype,
        x.dtype if norm is None else norm.weight.dtype,
        experts.shape[1],
        used.shape[0],
        None if bank is None else _formats(bank),
        None if shared is None else _formats(shared),
        None if gate is None else (gate.start, gate.rows.dtype),
        None if apart is None else apart.dtype,
        keep_apart,
    )
    # the place of what is not used is taken by any array
    absent = (x, x, x)
    gates, ups, downs = (absent,) * 3 if bank is None else _arrays(bank)
    shared_gates, shared_ups, shared_downs = (absent,) * 3 if shared is None else _arrays(shared)
    hidden, shared_hidden = x, x if alone is None else alone
    if norm is not None and hidden_launch is not None:
        hidden, shared_hidden = hidden_launch(
            *(x, norm.weight, norm.on_device),
            *gates,
            *ups,
            *shared_gates,
            *shared_ups,
            *(used, experts, table),
        )
    (out,) = sum_launch(
        *(x, hidden, shared_hidden),
        *downs,
        *shared_downs,
        *(used, experts, table, routing.weights),
        x if gate is None else gate.rows,
        routing.weights if apart is None else apart,
    )
    return out


def _arrays(matrices: ExpertWeights | SharedExpert) -> list[tuple[mx.array, mx.array, mx.array]]:
    """Data, scales and biases of gate, up and down."""
    return [
        (w.data, w.data, w.data) if w.scales is None else (w.data, w.scales, w.biases)
        for w in (matrices.gate, matrices.up, matrices.down)
    ]


def _formats(matrices: ExpertWeights | SharedExpert) -> Formats:
    gate, up, down = matrices.gate, matrices.up, matrices.down
    return _format_of(gate), _format_of(up), _format_of(down)


def _format_of(weight: Weight) -> Format:
    data, scales = weight.data, weight.scales
    floats = data if scales is None else scales
    return data.shape, weight.bits, weight.group_size, floats.dtype


@cache
def _launches(
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
) -> tuple[Launch | None, Launch]:
    """The two launches; of the first there is none where no expert is computed.

    x: shape. used: entries of the union. gate: column of the shared expert's gate, dtype of its
    rows. apart: dtype.
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
    inner = _inner(bank, dtype, hidden, "bank")
    shared_inner = _inner(shared, dtype, hidden, "shared expert")
    routed, with_shared = bank is not None, shared is not None
    most = 1 << (rows - 1).bit_length()
    tile = min(most, TILE_ROWS)
    common: dict[str, int | bool | mx.Dtype] = {
        "T": dtype,
        "INNER": inner,
        "SHARED_INNER": shared_inner,
        "TOP_K": top_k,
        "ROWS": tile,
        "ROUTED": routed,
        "WITH_SHARED": with_shared,
    }
    shared_tiles = with_shared * -(-rows // tile)  # the shared expert's rows are computed apart
    entries = routed * used + shared_tiles
    first = None
    if entries > 0:
        features = 2 if rows == 1 else 4  # of a simdgroup: one row alone needs more simdgroups
        threads = 32 * HIDDEN_SIMDGROUPS
        first = EXPERT_HIDDEN.launch(
            [
                (rows * top_k, inner) if bank else UNUSED,
                (rows, shared_inner) if shared else UNUSED,
            ],
            [mx.float32, mx.float32],
            grid=(
                -(-max(inner, shared_inner) // (features * HIDDEN_SIMDGROUPS)) * threads,
                entries,
                1,
            ),
            threadgroup=(threads, 1, 1),
            template={
                **common,
                **_packing(bank, 0, "", dtype),
                **_packing(shared, 0, "SHARED_", dtype),
                "HIDDEN": hidden,
                "FEATURES": features,
            },
        )
    # several rows need so many registers that 16 simdgroups might not fit
    threads = 32 * max(1, min(entries, 16 if rows == 1 else SUM_SIMDGROUPS))
    second = EXPERT_SUM.launch(
        [(rows, top_k, hidden) if keep_apart else (rows, hidden)],
        [mx.float32 if keep_apart else dtype],
        grid=(hidden // SUM_FEATURES * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        template={
            **common,
            **_packing(bank, 2, "", dtype),
            **_packing(shared, 2, "SHARED_", dtype),
            "O": mx.float32 if keep_apart else dtype,
            "MOST": most,
            "GATE": gate[0] if gate else 0,
            "APART": keep_apart,
        },
    )
    return first, second


def _inner(formats: Formats | None, dtype: mx.Dtype, hidden: int, name: str) -> int:
    """Intermediate features, of 8 where there are no experts; Unsupported for what is not taken."""
    if formats is None:
        return 8
    gate, up, down = formats
    if gate != up:
        raise Unsupported(f"kernel expert_hidden: {name}: up kept as {up}, expected {gate} as gate")
    inner = gate[0][-2]
    expected = {"gate": (inner, hidden), "down": (hidden, inner)}
    for matrix, (shape, bits, group, floats) in (("gate", gate), ("down", down)):
        found = f"kernel expert_hidden: {name}: {matrix}"
        if floats != dtype:
            raise Unsupported(f"{found} of {floats}, expected {dtype} as x")
        if bits and (bits not in PACKED or group not in GROUPS):
            raise Unsupported(
                f"{found} of {bits} bits in groups of {group}, "
                "expected 2, 3, 4, 5, 6 or 8 in groups of 32, 64 or 128"
            )
        features = shape[-1] * 32 // bits if bits else shape[-1]
        if (shape[-2], features) != expected[matrix] or features % 8:
            raise Unsupported(
                f"{found} {(shape[-2], features)}, expected {expected[matrix]}, multiples of 8"
            )
    return inner


def _packing(formats: Formats | None, matrix: int, prefix: str, dtype: mx.Dtype) -> dict[str, int]:
    """Template arguments for gate and up (0) or down (2)."""
    _, bits, group, _ = formats[matrix] if formats else ((), 0, 0, dtype)
    return {f"{prefix}BITS": bits, f"{prefix}GROUP": group or 32}
