"""The feed-forward of a layer with experts: gather, SwiGLU, weighted sum, shared expert, residual.

An expert's output for a row depends on that row and that expert alone, and a row adds its experts
in the order of its own routing: neither the other rows nor where experts lie change a bit.
"""

from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array, Backend, to_numpy
from specdec.kernels.executor import operation
from specdec.kernels.linear import Piece, linear
from specdec.kernels.norm import Norm, sigmoid_gate, swiglu
from specdec.kernels.routing import Routing
from specdec.kernels.weight import Weight

SORTED_FROM = 64  # (row, expert) pairs; from here on MLX shares an expert's weights between rows


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """A bank of experts: gate, up [slots, intermediate, hidden], down [slots, hidden, inter.]."""

    gate: Weight
    up: Weight
    down: Weight

    def on(self, backend: Backend) -> "ExpertWeights":
        """The same bank as a backend holds it, sharing its memory."""
        return ExpertWeights(*(w.on(backend) for w in (self.gate, self.up, self.down)))


@dataclass(frozen=True, eq=False)
class SharedExpert:
    """The expert all rows use: gate, up [intermediate, hidden], down [hidden, intermediate]."""

    gate: Weight
    up: Weight
    down: Weight


@operation("few rows")
def feed_forward(
    x: Array,
    norm: Norm,
    bank: ExpertWeights,
    routing: Routing,
    table: Array,
    shared: SharedExpert | None = None,
    shared_gate: Piece | None = None,
) -> Array:
    """x plus the weighted sum of the experts' outputs for norm(x): [rows, hidden].

    x [rows, hidden]; table int32 [experts]: the slot of each expert in the bank, for all that
    routing names. The shared expert's output is weighted by sigmoid(shared_gate), [rows, 1].
    """
    apart = _each(norm(x), bank, table[routing.experts])
    hidden = None if shared is None else shared_hidden(x, norm, shared)
    return combine(x, apart, routing, shared, hidden, shared_gate)


@operation("few rows")
def experts_apart(
    x: Array, norm: Norm, bank: ExpertWeights, routing: Routing, table: Array
) -> Array:
    """What `feed_forward` sums up, not yet weighted: [rows, top_k, hidden].

    Zero for experts whose entry in the table is -1: arrays of several calls add up to the whole.
    """
    slots = to_numpy(table)[to_numpy(routing.experts)]
    rows, ranks = (mx.array(places) for places in np.nonzero(slots >= 0))
    y = _each(norm(x)[rows], bank, mx.array(slots[slots >= 0])[:, None])
    apart = mx.zeros((*slots.shape, y.shape[-1]), y.dtype)
    apart[rows, ranks] = y[:, 0]
    return apart


@operation("few rows")
def shared_hidden(
    x: Array, norm: Norm, shared: SharedExpert, routing: Routing | None = None
) -> Array:
    """silu(gate h) * (up h) of the shared expert, h = norm(x): [rows, intermediate].

    What `feed_forward` needs none of the routed experts for, the shared expert's last product left
    out; to be computed while they are read. routing: what was routed for x, if it was.
    """
    h = norm(x)
    return swiglu(linear(h, shared.gate), linear(h, shared.up))


@operation("few rows")
def combine(
    x: Array,
    apart: Array,
    routing: Routing,
    shared: SharedExpert | None = None,
    hidden: Array | None = None,
    shared_gate: Piece | None = None,
) -> Array:
    """`feed_forward` from what `experts_apart` and `shared_hidden` gave: [rows, hidden]."""
    y = (apart * routing.weights[..., None].astype(apart.dtype)).sum(axis=1)
    if shared is not None and hidden is not None and shared_gate is not None:
        output = linear(hidden.astype(x.dtype), shared.down)
        y = y + sigmoid_gate(output, shared_gate.values)
    return x + y


def _each(x: mx.array, bank: ExpertWeights, slots: mx.array) -> mx.array:
    """Every row of x [rows, hidden] through the experts in slots [rows, n]: [rows, n, hidden]."""
    rows, n = slots.shape
    pairs, of = slots.reshape(-1), mx.arange(rows * n) // n
    ordered = rows * n >= SORTED_FROM
    if ordered:
        order = mx.argsort(pairs)
        pairs, of = pairs[order], of[order]
    x = x[of][:, None]  # [pairs, 1, hidden]
    gathered = partial(_gather, slots=pairs, ordered=ordered)
    y = gathered(swiglu(gathered(x, bank.gate), gathered(x, bank.up)), bank.down)[:, 0]
    return (y[mx.argsort(order)] if ordered else y).reshape(rows, n, -1)


def _gather(x: mx.array, weight: Weight, slots: mx.array, ordered: bool) -> mx.array:
    """x [pairs, 1, in] times the transposed matrix in each slot [pairs]: [pairs, 1, out]."""
    if not weight.quantized:
        transposed = weight.data.swapaxes(-1, -2)
        return mx.gather_mm(x, transposed, rhs_indices=slots, sorted_indices=ordered)
    return mx.gather_qmm(
        x,
        weight.data,
        weight.scales,
        weight.biases,
        rhs_indices=slots,
        transpose=True,
        group_size=weight.group_size,
        bits=weight.bits,
        sorted_indices=ordered,
    )
