"""The feed-forward of a layer with experts: every expert's weights are read once for all its rows.

One compiled function serves all of the operations, so that experts delivered in several waves and
summed up later give the bits of all at once.
"""

import numpy as np

from specdec.kernels.cpu.expert_parts import INNER, OUTER, compute_experts
from specdec.kernels.cpu.products import products
from specdec.kernels.cpu.team import TEAM
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
        work = INNER | OUTER
    always = *_always(shared, shared_gate), work, hidden
    compute_experts(
        TEAM.place,
        products(),
        x,
        norm.weight,
        norm.eps,
        *some,
        apart,
        routing.weights,
        *always,
        out,
    )
    return out


def experts_apart(
    x: np.ndarray, norm: Norm, bank: ExpertWeights, routing: Routing, table: np.ndarray
) -> np.ndarray:
    """The outputs of each row's experts that the table has: [rows, top_k, hidden], else zero."""
    rows, top_k = routing.experts.shape
    apart = np.zeros((rows * top_k, x.shape[1]), np.float32)
    some = bank.gate.table, bank.up.table, bank.down.table, routing.experts, table
    none = *_always(None, None), 0, _NO_ROWS
    compute_experts(
        TEAM.place, products(), x, norm.weight, norm.eps, *some, apart, _NO_ROWS, *none, _NO_ROWS
    )
    return apart.reshape(rows, top_k, -1)


def shared_hidden(
    x: np.ndarray, norm: Norm, shared: SharedExpert, routing: Routing | None = None
) -> np.ndarray:
    """What stands between the shared expert's matrices: [rows, intermediate]."""
    hidden = np.empty((len(x), shared.gate.out_features), np.float32)
    tables = shared.gate.table, shared.up.table, shared.down.table
    always = *tables, _NO_ROWS, 0, INNER, hidden
    compute_experts(
        TEAM.place,
        products(),
        x,
        norm.weight,
        norm.eps,
        *_NONE,
        _NO_ROWS,
        _NO_ROWS,
        *always,
        _NO_ROWS,
    )
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
    compute_experts(TEAM.place, products(), x, _NO_SCALE, 0.0, *_NONE, flat, weights, *always, out)
    return out


def _always(shared: SharedExpert | None, gate: Piece | None) -> tuple:
    """The shared expert's tables and the rows and the column of its gate."""
    if shared is None or gate is None:
        return _NO_TABLE, _NO_TABLE, _NO_TABLE, _NO_ROWS, 0
    return shared.gate.table, shared.up.table, shared.down.table, gate.rows, gate.start
