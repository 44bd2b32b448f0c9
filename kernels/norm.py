"""Normalizations over the last axis, each row by itself."""

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from specdec.kernels.array import Array, OnCpu, is_numpy
from specdec.kernels.gpu.resident import resident

cpu = OnCpu("norm")


@dataclass(frozen=True, eq=False)
class Norm:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; weight [n]."""

    weight: Array
    eps: float

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.weight, self.eps)

    @property
    def on_device(self) -> mx.array:
        """eps for GPU kernels, the first element of a float32 array."""
        return _resident_eps(self.eps)


@cache
def _resident_eps(eps: float) -> mx.array:
    return resident([eps], mx.float32)


def rms_norm(x: Array, weight: Array | None, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight, statistics in float32; x [..., n], weight [n] or None."""
    if is_numpy(x):
        return cpu.rms_norm(x, weight, eps)
    return mx.fast.rms_norm(x, weight, eps)


def gated_rms_norm(x: mx.array, gate: mx.array, weight: mx.array, eps: float) -> mx.array:
    """silu(gate) * rms_norm(x), the output norm of a gated delta layer; x and gate [..., n].

    The gate is applied in float32, as Qwen3-Next does, and the result has x's dtype.
    """
    gate = gate.astype(mx.float32)
    return (silu(gate) * rms_norm(x, weight, eps).astype(mx.float32)).astype(x.dtype)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x), element by element."""
    return x * mx.sigmoid(x)


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up, element by element."""
    if is_numpy(up):
        return cpu.swiglu(gate, up)
    return silu(gate) * up


def sigmoid_gate(x: mx.array, gate: mx.array) -> mx.array:
    """x [rows, n] * sigmoid(gate), gate [rows, n] or [rows, 1]."""
    return x * mx.sigmoid(gate)
