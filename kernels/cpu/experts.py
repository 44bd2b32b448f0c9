"""The routed experts' feed-forward: every expert's weights are read once for all of its rows."""

import numpy as np

from specdec.kernels.cpu.jit import jit
from specdec.kernels.cpu.linear import grouped, linear
from specdec.kernels.cpu.norm import sigmoid_gate, swiglu
from specdec.kernels.experts import ExpertWeights, SharedExpert
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm
from specdec.kernels.routing import Routing


def feed_forward(
    x: np.ndarray,
    norm: Norm,
    bank: ExpertWeights,
    routing: Routing,
    table: np.ndarray,
    shared: SharedExpert | None = None,
    shared_gate: Piece | None = None,
) -> np.ndarray:
    """x plus its experts' weighted outputs, as kernels.experts: [rows, hidden]."""
    apart = experts_apart(x, norm, bank, routing, table)
    return combine(x, norm, apart, routing, shared, shared_gate)


def experts_apart(
    x: np.ndarray, norm: Norm, bank: ExpertWeights, routing: Routing, table: np.ndarray
) -> np.ndarray:
    """The outputs of each row's experts that the table has: [rows, top_k, hidden], else zero."""
    rows, top_k = routing.experts.shape
    slots = table[routing.experts].reshape(-1)
    order, used, ends = _by_slot(slots, len(bank.down.data))
    sources, h = order // top_k, norm(x)
    gate = grouped(h, bank.gate, used, ends, sources)
    up = grouped(h, bank.up, used, ends, sources)
    down = grouped(swiglu(gate, up), bank.down, used, ends, np.arange(len(order)))
    out = np.zeros((rows * top_k, down.shape[1]), np.float32)
    out[order] = down
    return out.reshape(rows, top_k, -1)


def combine(
    x: np.ndarray,
    norm: Norm,
    apart: np.ndarray,
    routing: Routing,
    shared: SharedExpert | None = None,
    shared_gate: Piece | None = None,
) -> np.ndarray:
    """`feed_forward` from what `experts_apart` gave: [rows, hidden]."""
    y = np.zeros_like(x)
    _combine(np.ascontiguousarray(apart), routing.weights, y)
    if shared is not None and shared_gate is not None:
        h = norm(x)
        hidden = swiglu(linear(h, shared.gate), linear(h, shared.up))
        y += sigmoid_gate(linear(hidden, shared.down), shared_gate.values)
    return x + y


@jit
def _by_slot(slots, stack):  # type: ignore[no-untyped-def]
    """Pairs by slot, those without one left out: their order, the slots in use, and where each
    one's pairs begin and end."""
    counts = np.zeros(stack + 1, np.int64)
    for slot in slots:
        if slot >= 0:
            counts[slot + 1] += 1
    used = np.flatnonzero(counts[1:])
    starts = np.cumsum(counts)
    total = starts[stack]
    ends = np.empty(len(used) + 1, np.int64)
    for i in range(len(used)):
        ends[i] = starts[used[i]]
    ends[len(used)] = total
    order = np.empty(total, np.int64)
    for pair in range(len(slots)):
        if slots[pair] >= 0:
            order[starts[slots[pair]]] = pair
            starts[slots[pair]] += 1
    return order, used, ends


@jit
def _combine(outputs, weights, out):  # type: ignore[no-untyped-def]
    for row in range(outputs.shape[0]):
        for k in range(outputs.shape[1]):
            for i in range(outputs.shape[2]):
                out[row, i] += outputs[row, k, i] * weights[row, k]
