"""The feed-forward of a layer with experts on a GPU, in two launches.

`expert_hidden` computes what stands between an expert's matrices, `expert_sum` the rest. An expert
that several rows use is read once, and the shared expert is one more that all rows use. Neither the
other rows nor the slots of a bank change a bit of a row. In bfloat16 both may run on matrix units
(tiles.py): with the weights of 4 or 8 bits or dense, what stands between is bfloat16 then.
"""

from functools import cache

import mlx.core as mx

from specdec.kernels.experts import ExpertWeights, SharedExpert
from specdec.kernels.gpu.expert_formats import arrays_of, formats_of
from specdec.kernels.gpu.expert_launches import launches
from specdec.kernels.gpu.expert_tiles import EXPERT_HIDDEN_TILES
from specdec.kernels.gpu.kernel import Launch
from specdec.kernels.gpu.limits import Unsupported
from specdec.kernels.gpu.normed import normed_rows, normed_shape
from specdec.kernels.gpu.resident import resident
from specdec.kernels.gpu.tiles import tiles_on
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm
from specdec.kernels.routing import Routing


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
    y = _run(x, norm, bank, routing, table, shared, shared_gate)
    if y is None:
        apart = experts_apart(x, norm, bank, routing, table)
        hidden = None if shared is None else shared_hidden(x, norm, shared, routing)
        y = combine(x, apart, routing, shared, hidden, shared_gate)
    return y


def experts_apart(
    x: mx.array, norm: Norm, bank: ExpertWeights, routing: Routing, table: mx.array
) -> mx.array:
    """The experts' outputs, not weighted: float32 [rows, top_k, hidden]; 0 where table says -1."""
    apart = _run(x, norm, bank, routing, table, keep_apart=True)
    assert apart is not None
    return apart


def shared_hidden(
    x: mx.array, norm: Norm, shared: SharedExpert, routing: Routing | None = None
) -> mx.array:
    """What stands between the shared expert's matrices: [rows, intermediate], float32, or T on
    matrix units."""
    formats = None, formats_of(shared), None, None
    pair = launches(x.shape, x.dtype, norm.weight.dtype, 1, 0, *formats, False, tiles_on())
    assert pair is not None
    launch, _ = pair
    assert launch is not None
    gates, ups, _ = arrays_of(shared)
    absent, no_numbers = (x, x, x), (_numbers(),) * 3
    read = _read_of(launch, x, norm, None if routing is None else routing.normed)
    _, hidden = launch(*read, *absent, *absent, *gates, *ups, *no_numbers)
    return hidden


def _read_of(
    launch: Launch, x: mx.array, norm: Norm, normed: mx.array | None
) -> tuple[mx.array, ...]:
    """What the launch reads of x and its norm, made now where it is normed rows and not there."""
    if launch.kernel is not EXPERT_HIDDEN_TILES:
        return x, norm.weight, norm.on_device
    assert normed is None or normed.shape == normed_shape(*x.shape)
    return (normed_rows(x, norm) if normed is None else normed,)


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
    y = _run(x, None, None, routing, routing.experts, shared, shared_gate, apart, hidden)
    assert y is not None
    return y


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
) -> mx.array | None:
    """apart, alone: what experts_apart and shared_hidden gave; without a norm these are all.

    None where no two launches compute both the routed experts and the shared one.
    """
    experts, used = routing.experts, routing.union
    if bank is None:
        used = experts
    elif used is None:
        raise Unsupported("kernel expert_hidden: a routing without union, expected the kernel's")
    pair = launches(
        x.shape,
        x.dtype,
        x.dtype if norm is None else norm.weight.dtype,
        experts.shape[1],
        used.shape[0],
        None if bank is None else formats_of(bank),
        None if shared is None else formats_of(shared),
        None if gate is None else (gate.start, gate.rows.dtype),
        None if apart is None else apart.dtype,
        keep_apart,
        tiles_on(),
    )
    if pair is None:
        return None
    hidden_launch, sum_launch = pair
    # the place of what is not used is taken by any array
    absent = (x, x, x)
    gates, ups, downs = (absent,) * 3 if bank is None else arrays_of(bank)
    shared_gates, shared_ups, shared_downs = (absent,) * 3 if shared is None else arrays_of(shared)
    hidden, shared_hidden = x, x if alone is None else alone
    if norm is not None and hidden_launch is not None:
        hidden, shared_hidden = hidden_launch(
            *_read_of(hidden_launch, x, norm, routing.normed),
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
