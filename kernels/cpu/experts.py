"""The feed-forward of a layer with experts: every expert's weights are read once for all its rows.

One compiled function serves all three operations, so that experts delivered in several waves and
summed up later give the bits of all at once.
"""

import numpy as np

from specdec.kernels.cpu.exp import sigmoid, silu
from specdec.kernels.cpu.jit import inlined, jit
from specdec.kernels.cpu.norm import normalize
from specdec.kernels.cpu.products import BITS, OUT, lay_out, multiply, padded_size
from specdec.kernels.cpu.vectors import weigh
from specdec.kernels.experts import ExpertWeights, SharedExpert
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm
from specdec.kernels.routing import Routing

_NO_TABLE = np.zeros(8, np.int64)
_NO_ROWS = np.zeros((0, 0), np.float32)
_NO_EXPERTS = np.zeros((0, 0), np.int32)
_NO_SLOTS = np.zeros(0, np.int32)


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
    apart = np.empty((routing.experts.size, x.shape[1]), np.float32)
    out = np.empty(x.shape, np.float32)
    some = bank.gate.table, bank.up.table, bank.down.table, routing.experts, table
    _experts(
        x, norm.weight, norm.eps, *some, apart, routing.weights, *_always(shared, shared_gate), out
    )
    return out


def experts_apart(
    x: np.ndarray, norm: Norm, bank: ExpertWeights, routing: Routing, table: np.ndarray
) -> np.ndarray:
    """The outputs of each row's experts that the table has: [rows, top_k, hidden], else zero."""
    rows, top_k = routing.experts.shape
    apart = np.zeros((rows * top_k, x.shape[1]), np.float32)
    some = bank.gate.table, bank.up.table, bank.down.table, routing.experts, table
    none = _always(None, None)
    _experts(x, norm.weight, norm.eps, *some, apart, _NO_ROWS, *none, _NO_ROWS)
    return apart.reshape(rows, top_k, -1)


def combine(
    x: np.ndarray,
    norm: Norm,
    apart: np.ndarray,
    routing: Routing,
    shared: SharedExpert | None = None,
    shared_gate: Piece | None = None,
) -> np.ndarray:
    """`feed_forward` from what `experts_apart` gave: [rows, hidden]."""
    out = np.empty(x.shape, np.float32)
    flat = np.ascontiguousarray(apart).reshape(-1, x.shape[1])
    none = _NO_TABLE, _NO_TABLE, _NO_TABLE, _NO_EXPERTS, _NO_SLOTS
    weights = np.ascontiguousarray(routing.weights)
    _experts(x, norm.weight, norm.eps, *none, flat, weights, *_always(shared, shared_gate), out)
    return out


def _always(shared: SharedExpert | None, gate: Piece | None) -> tuple:
    """The shared expert's tables and the rows and the column of its gate."""
    if shared is None or gate is None:
        return _NO_TABLE, _NO_TABLE, _NO_TABLE, _NO_ROWS, 0
    return shared.gate.table, shared.up.table, shared.down.table, gate.rows, gate.start


@jit
def _experts(  # type: ignore[no-untyped-def]
    x,
    scale,
    eps,
    gate,
    up,
    down,
    experts,
    table,
    apart,
    weights,
    shared_gate,
    shared_up,
    shared_down,
    share,
    column,
    out,
):
    """Fill `apart` for the experts given, then sum it up to `out` where that has rows."""
    rows, size = x.shape
    h = np.empty((rows, size), np.float32)
    for row in range(rows):
        normalize(x[row], scale, eps, h[row])
    if len(experts) > 0:
        order, used, ends = _by_slot(experts, table)
        y = np.empty((len(order), size), np.float32)
        sources = order // experts.shape[1]
        _swiglu_experts(h, sources, used, ends, gate, up, down, y)
        for i in range(len(order)):
            apart[order[i]] = y[i]
    if len(out) == 0:
        return
    y = np.empty((rows if shared_gate[BITS] else 0, size), np.float32)
    if shared_gate[BITS]:
        used, ends = np.zeros(1, np.int64), np.array([0, rows])
        sources = np.arange(rows)
        _swiglu_experts(h, sources, used, ends, shared_gate, shared_up, shared_down, y)
    top_k = weights.shape[1]
    gate_of_shared = np.empty(1, np.float32)
    for row in range(rows):
        total = h[row]
        total[:] = 0
        weigh(apart, row * top_k, weights[row], 0, top_k, total)
        if shared_gate[BITS]:
            gate_of_shared[0] = sigmoid(share[row, column])
            weigh(y, row, gate_of_shared, 0, 1, total)
        for i in range(size):
            out[row, i] = x[row, i] + total[i]


@jit
def _swiglu_experts(h, sources, used, ends, gate, up, down, y):  # type: ignore[no-untyped-def]
    """y[i] = down(silu(gate h) * up h) of row sources[i], by the matrices of its group's slot.

    used: the slot of each group; ends: where the groups begin and end.
    """
    pairs = len(sources)
    first = _laid_out(gate, h)
    second = first if (gate[BITS] == 4) == (up[BITS] == 4) else _laid_out(up, h)
    g = np.empty((pairs, gate[OUT]), np.float32)
    u = np.empty((pairs, gate[OUT]), np.float32)
    inner = np.empty((pairs, padded_size(down)), np.float32)
    straight = np.arange(pairs)
    # One call in the code for the three matrices: the compiler makes a copy for each.
    for phase in range(3):
        w = gate if phase == 0 else up if phase == 1 else down
        inputs = first if phase == 0 else second if phase == 1 else inner
        at = straight if phase == 2 else sources
        to = g if phase == 0 else u if phase == 1 else y
        if phase == 2:
            for i in range(pairs):
                row, other = g[i], u[i]
                for j in range(len(row)):
                    row[j] = silu(row[j]) * other[j]
                lay_out(down, row, inner[i])
        for group in range(len(used)):
            multiply(w, used[group], inputs, at, ends[group], ends[group + 1], to, 0)


@inlined
def _laid_out(w, h):  # type: ignore[no-untyped-def]
    inputs = np.empty((h.shape[0], padded_size(w)), np.float32)
    for row in range(h.shape[0]):
        lay_out(w, h[row], inputs[row])
    return inputs


@jit
def _by_slot(experts, table):  # type: ignore[no-untyped-def]
    """Pairs by slot, those without one left out: their order, the slots in use, and where each
    one's pairs begin and end."""
    rows, top_k = experts.shape
    stack = 0
    for slot in table:
        stack = max(stack, slot + 1)
    starts = np.zeros(stack + 1, np.int64)
    for row in range(rows):
        for k in range(top_k):
            slot = table[experts[row, k]]
            if slot >= 0:
                starts[slot + 1] += 1
    used = np.flatnonzero(starts[1:])
    ends = np.zeros(len(used) + 1, np.int64)
    for i in range(len(used)):
        ends[i + 1] = ends[i] + starts[used[i] + 1]
    for slot in range(stack):
        starts[slot + 1] += starts[slot]
    order = np.empty(starts[stack], np.int64)
    for row in range(rows):
        for k in range(top_k):
            slot = table[experts[row, k]]
            if slot >= 0:
                order[starts[slot]] = row * top_k + k
                starts[slot] += 1
    return order, used, ends
