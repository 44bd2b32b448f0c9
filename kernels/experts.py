"""The routed experts' feed-forward: gather, SwiGLU, weighted sum."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array, Backend, OnCpu, is_numpy
from specdec.kernels.norm import swiglu
from specdec.kernels.weight import Weight

cpu = OnCpu("experts")


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """A bank of experts: gate, up [slots, intermediate, hidden], down [slots, hidden, inter.]."""

    gate: Weight
    up: Weight
    down: Weight

    def on(self, backend: Backend) -> "ExpertWeights":
        """The same bank as a backend holds it, sharing its memory."""
        return ExpertWeights(*(w.on(backend) for w in (self.gate, self.up, self.down)))


def experts_apart(x: Array, bank: ExpertWeights, slots: Array | np.ndarray) -> Array:
    """Each row through each of its experts, not yet weighted.

    x [rows, hidden]; slots int32 [rows, n], indexes into the bank. Returns [rows, n, hidden]; an
    expert's output for a row depends on that row and expert alone.
    """
    if is_numpy(x):
        return cpu.experts_apart(x, bank, slots)
    slots = mx.array(slots)
    x = x[:, None, None, :]  # [rows, 1, 1, hidden]
    hidden = swiglu(_gather(x, bank.gate, slots), _gather(x, bank.up, slots))
    return _gather(hidden, bank.down, slots)[:, :, 0]


def combine(outputs: Array, weights: Array) -> Array:
    """Sum of outputs [rows, n, hidden] times weights [rows, n], in the order of n."""
    if is_numpy(outputs):
        return cpu.combine(outputs, weights)
    return (outputs * weights[..., None].astype(outputs.dtype)).sum(axis=1)


def _gather(x: mx.array, weight: Weight, slots: mx.array) -> mx.array:
    """x [rows, 1 or n, 1, in] times the transposed matrix in each slot: [rows, n, 1, out]."""
    if not weight.quantized:
        return mx.gather_mm(x, weight.data.swapaxes(-1, -2), rhs_indices=slots)
    return mx.gather_qmm(
        x,
        weight.data,
        weight.scales,
        weight.biases,
        rhs_indices=slots,
        transpose=True,
        group_size=weight.group_size,
        bits=weight.bits,
    )
