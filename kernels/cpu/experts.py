"""The feed-forward of a layer with experts: every expert's weights are read once for all its rows.

One compiled function serves all of the operations, so that experts delivered in several waves and
summed up later give the bits of all at once.
"""

import numpy as np

from specdec.kernels.cpu.exp import sigmoid, silu
from specdec.kernels.cpu.jit import jit
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
_NO_SCALE = np.zeros(0, np.float32)
_NONE = _NO_TABLE, _NO_TABLE, _NO_TABLE, _NO_EXPERTS, _NO_SLOTS  # routed experts
# What is done of the shared expert: what stands between its matrices, and what comes after.
INNER, OUTER = 1, 2


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
    work, hidden = 0, _NO_ROWS
    if shared is not None and shared_gate is not None:
        work, hidden = INNER | OUTER, np.empty((len(x), shared.gate.out_features), np.float32)
    always = *_always(shared, shared_gate), work, hidden
    _experts(x, norm.weight, norm.eps, *some, apart, routing.weights, *always, out)
    return out


def experts_apart(
    x: np.ndarray, norm: Norm, bank: ExpertWeights, routing: Routing, table: np.ndarray
) -> np.ndarray:
    """The outputs of each row's experts that the table has: [rows, top_k, hidden], else zero."""
    rows, top_k = routing.experts.shape
    apart = np.zeros((rows * top_k, x.shape[1]), np.float32)
    some = bank.gate.table, bank.up.table, bank.down.table, routing.experts, table
    none = *_always(None, None), 0, _NO_ROWS
    _experts(x, norm.weight, norm.eps, *some, apart, _NO_ROWS, *none, _NO_ROWS)
    return apart.reshape(rows, top_k, -1)


def shared_hidden(x: np.ndarray, norm: Norm, shared: SharedExpert) -> np.ndarray:
    """What stands between the shared expert's matrices: [rows, intermediate]."""
    hidden = np.empty((len(x), shared.gate.out_features), np.float32)
    tables = shared.gate.table, shared.up.table, shared.down.table
    always = *tables, _NO_ROWS, 0, INNER, hidden
    _experts(x, norm.weight, norm.eps, *_NONE, _NO_ROWS, _NO_ROWS, *always, _NO_ROWS)
    return hidden


def combine(
    x: np.ndarray,
    apart: np.ndarray,
    routing: Routing,
    shared: SharedExpert | None = None,
    hidden: np.ndarray | None = None,
    shared_gate: Piece | None = None,
) -> np.ndarray:
    """`feed_forward` from what `experts_apart` and `shared_hidden` gave: [rows, hidden]."""
    out = np.empty(x.shape, np.float32)
    flat = np.ascontiguousarray(apart).reshape(-1, x.shape[1])
    weights = np.ascontiguousarray(routing.weights)
    work, inner = (0, _NO_ROWS) if hidden is None else (OUTER, hidden)
    always = *_always(shared, shared_gate), work, inner
    _experts(x, _NO_SCALE, 0.0, *_NONE, flat, weights, *always, out)
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
    work,
    hidden,
    out,
):
    """Fill `apart` for the experts given, and `hidden` if `work` says so; then sum up to `out`
    where that has rows."""
    rows, size = x.shape
    h = np.empty((rows, size), np.float32)
    if len(experts) > 0 or work & INNER:
        for row in range(rows):
            normalize(x[row], scale, eps, h[row])
    y = np.empty((0, size), np.float32)
    # The routed experts, then the shared one. One call of `multiply` in the code for all of their
    # matrices: the compiler makes a copy for each call.
    for part in range(2):
        routed = part == 0
        if len(experts) == 0 if routed else work == 0:
            continue
        if routed:
            order, used, ends = _by_slot(experts, table)
            sources = order // experts.shape[1]
        else:
            order = np.arange(rows)
            used, ends = np.zeros(1, np.int64), np.full(2, rows)
            ends[0] = 0
            sources = order
        g_w, u_w = (gate, up) if routed else (shared_gate, shared_up)
        d_w = down if routed else shared_down
        pairs = len(sources)
        begins = routed or work & INNER > 0
        ends_here = routed or work & OUTER > 0
        first = second = h
        if begins:
            first = _laid_out(g_w, h)
            second = first if (g_w[BITS] == 4) == (u_w[BITS] == 4) else _laid_out(u_w, h)
        g = np.empty((pairs, g_w[OUT]), np.float32) if routed else hidden
        u = np.empty((pairs if begins else 0, g_w[OUT]), np.float32)
        inner = np.empty((pairs if ends_here else 0, padded_size(d_w)), np.float32)
        y = np.empty((pairs if ends_here else 0, size), np.float32)
        straight = np.arange(pairs)
        for phase in range(3):
            if not (ends_here if phase == 2 else begins):
                continue
            w = g_w if phase == 0 else u_w if phase == 1 else d_w
            inputs = first if phase == 0 else second if phase == 1 else inner
            at = straight if phase == 2 else sources
            to = g if phase == 0 else u if phase == 1 else y
            if phase == 2:
                for i in range(pairs):
                    lay_out(d_w, g[i], inner[i])
            for group in range(len(used)):
                multiply(w, used[group], inputs, at, ends[group], ends[group + 1], to, 0)
            if phase == 1:
                for i in range(pairs):
                    own, other = g[i], u[i]
                    for j in range(len(own)):
                        own[j] = silu(own[j]) * other[j]
        if routed:
            for i in range(pairs):
                apart[order[i]] = y[i]
    if len(out) == 0:
        return
    top_k = weights.shape[1]
    gate_of_shared = np.empty(1, np.float32)
    for row in range(rows):
        total = h[row]
        total[:] = 0
        weigh(apart, row * top_k, weights[row], 0, top_k, total)
        if work & OUTER:
            gate_of_shared[0] = sigmoid(share[row, column])
            weigh(y, row, gate_of_shared, 0, 1, total)
        for i in range(size):
            out[row, i] = x[row, i] + total[i]


@jit
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
    groups = 0
    for slot in range(stack):
        groups += starts[slot + 1] > 0
    used = np.empty(groups, np.int64)
    ends = np.zeros(groups + 1, np.int64)
    groups = 0
    for slot in range(stack):
        if starts[slot + 1] > 0:
            used[groups] = slot
            groups += 1
            ends[groups] = ends[groups - 1] + starts[slot + 1]
        starts[slot + 1] += starts[slot]
    order = np.empty(starts[stack], np.int64)
    for row in range(rows):
        for k in range(top_k):
            slot = table[experts[row, k]]
            if slot >= 0:
                order[starts[slot]] = row * top_k + k
                starts[slot] += 1
    return order, used, ends
