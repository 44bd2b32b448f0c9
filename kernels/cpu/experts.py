"""The routed experts' feed-forward: every expert's weights are read once for all of its rows."""

import numpy as np

from specdec.kernels.cpu.jit import jit
from specdec.kernels.cpu.linear import grouped
from specdec.kernels.cpu.norm import swiglu
from specdec.kernels.experts import ExpertWeights


def experts_apart(x: np.ndarray, bank: ExpertWeights, slots: np.ndarray) -> np.ndarray:
    """Each row through each of its experts.

    x [rows, hidden], slots int [rows, n] -> [rows, n, hidden].
    """
    rows, n = slots.shape
    order, used, ends = _by_slot(np.ascontiguousarray(slots).reshape(-1), len(bank.down.data))
    sources = order // n
    gate = grouped(x, bank.gate, used, ends, sources)
    up = grouped(x, bank.up, used, ends, sources)
    pairs = np.arange(rows * n)
    down = grouped(swiglu(gate, up), bank.down, used, ends, pairs)
    out = np.empty_like(down)
    out[order] = down
    return out.reshape(rows, n, -1)


def combine(outputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum of outputs [rows, n, hidden] times weights [rows, n], in the order of n."""
    out = np.zeros((outputs.shape[0], outputs.shape[2]), np.float32)
    _combine(np.ascontiguousarray(outputs), weights, out)
    return out


@jit
def _by_slot(slots, stack):  # type: ignore[no-untyped-def]
    """Pairs by slot: their order, the slots in use, and where each one's pairs begin and end."""
    counts = np.zeros(stack + 1, np.int64)
    for slot in slots:
        counts[slot + 1] += 1
    used = np.flatnonzero(counts[1:])
    starts = np.cumsum(counts)
    ends = np.empty(len(used) + 1, np.int64)
    for i in range(len(used)):
        ends[i] = starts[used[i]]
    ends[len(used)] = len(slots)
    order = np.empty(len(slots), np.int64)
    for pair in range(len(slots)):
        order[starts[slots[pair]]] = pair
        starts[slots[pair]] += 1
    return order, used, ends


@jit
def _combine(outputs, weights, out):  # type: ignore[no-untyped-def]
    for row in range(outputs.shape[0]):
        for k in range(outputs.shape[1]):
            for i in range(outputs.shape[2]):
                out[row, i] += outputs[row, k, i] * weights[row, k]
