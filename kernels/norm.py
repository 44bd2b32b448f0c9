"""Normalizations over the last axis, each row by itself."""

import mlx.core as mx


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """x / sqrt(mean(x^2) + eps) * weight, statistics in float32; x [..., n], weight [n] or None."""
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


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up, element by element."""
    return silu(gate) * up
