"""The routed experts' feed-forward: every expert's weights are read once for all of its rows."""

import numpy as np

from specdec.kernels.cpu.linear import grouped
from specdec.kernels.cpu.norm import swiglu
from specdec.kernels.experts import ExpertWeights


def experts_apart(x: np.ndarray, bank: ExpertWeights, slots: np.ndarray) -> np.ndarray:
    """Each row through each of its experts.

    x [rows, hidden], slots int [rows, n] -> [rows, n, hidden].
    """
    rows, n = slots.shape
    flat = slots.reshape(-1)
    order = np.argsort(flat, kind="stable")  # pairs by expert
    used, starts = np.unique(flat[order], return_index=True)
    ends = np.append(starts, len(flat))
    sources = order // n
    gate = grouped(x, bank.gate, used, ends, sources)
    up = grouped(x, bank.up, used, ends, sources)
    down = grouped(swiglu(gate, up), bank.down, used, ends, np.arange(len(flat)))
    out = np.empty((rows * n, down.shape[1]), np.float32)
    out[order] = down
    return out.reshape(rows, n, -1)


def combine(outputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum of outputs [rows, n, hidden] times weights [rows, n], in the order of n."""
    total = outputs[:, 0] * weights[:, 0, None]
    for k in range(1, outputs.shape[1]):
        total += outputs[:, k] * weights[:, k, None]
    return total
