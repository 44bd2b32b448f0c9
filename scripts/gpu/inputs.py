"""Random inputs of the operations at a geometry: weights as random bits, on MLX's device."""

import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from scripts.gpu.geometry import Geometry
from specdec.kernels.attention_inputs import AttentionShape
from specdec.kernels.experts import ExpertWeights, SharedExpert
from specdec.kernels.gated_delta import DeltaInputs, DeltaWeights
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm
from specdec.kernels.rope import Rope, RopeConfig
from specdec.kernels.weight import Weight

EPS = 1e-6


def normal(dtype: mx.Dtype, *shape: int, scale: float = 1.0) -> mx.array:
    return (mx.random.normal(shape) * scale).astype(dtype)


def weight(dtype: mx.Dtype, *shape: int, bits: int = 4, group: int = 64) -> Weight:
    """A matrix [..., out, in] whose products stay near 1; bits 0: dense."""
    into = shape[-1]
    if bits == 0:
        return Weight(normal(dtype, *shape, scale=into**-0.5))
    words = (*shape[:-1], into * bits // 32)
    data = mx.random.randint(-(1 << 31), (1 << 31) - 1, words).view(mx.uint32)
    deviation = math.sqrt((4**bits - 1) / 12)  # of a random code
    groups = (*shape[:-1], into // group)
    scales = mx.random.uniform(0.7, 1.3, groups) / (deviation * into**0.5)
    biases = -scales * (2**bits - 1) * mx.random.uniform(0.4, 0.6, groups)
    return Weight(data, scales.astype(dtype), biases.astype(dtype), bits, group)


def norm(dtype: mx.Dtype, size: int) -> Norm:
    return Norm(1 + normal(dtype, size, scale=0.1), EPS)


def bank(dtype: mx.Dtype, g: Geometry, slots: int, bits: int = 4, group: int = 64) -> ExpertWeights:
    hidden, inner = g.hidden_size, g.moe_intermediate_size
    gate, up = (weight(dtype, slots, inner, hidden, bits=bits, group=group) for _ in range(2))
    return ExpertWeights(gate, up, weight(dtype, slots, hidden, inner, bits=bits, group=group))


def shared_expert(dtype: mx.Dtype, g: Geometry, bits: int = 4) -> SharedExpert:
    hidden, inner = g.hidden_size, g.shared_expert_intermediate_size
    gate, up = (weight(dtype, inner, hidden, bits=bits) for _ in range(2))
    return SharedExpert(gate, up, weight(dtype, hidden, inner, bits=bits))


def attention_shape(dtype: mx.Dtype, g: Geometry) -> AttentionShape:
    dim = g.head_dim
    return AttentionShape(
        g.num_attention_heads,
        g.num_key_value_heads,
        dim,
        True,
        norm(dtype, dim),
        norm(dtype, dim),
    )


def attention_pieces(dtype: mx.Dtype, g: Geometry, rows: int) -> list[Piece]:
    """Queries with gates, keys and values, as one projection gives them."""
    q, kv = g.q_features, g.kv_features
    fused = normal(dtype, rows, q + 2 * kv)
    return [Piece(fused, 0, q), Piece(fused, q, kv), Piece(fused, q + kv, kv)]


def turns(g: Geometry, positions: np.ndarray) -> tuple[mx.array, mx.array]:
    """cos and sin of the positions, a quarter of a head turning."""
    rope = Rope(RopeConfig(g.head_dim // 4, 1e7))
    return rope.rows(np.asarray(positions, np.int32), mx.zeros(1))


def delta_weights(dtype: mx.Dtype, g: Geometry) -> DeltaWeights:
    heads, taps = g.linear_num_value_heads, g.linear_conv_kernel_dim
    steps = mx.exp(mx.random.uniform(np.log(1e-3), np.log(0.1), (heads,)))
    return DeltaWeights(
        normal(dtype, taps, g.conv_channels, scale=taps**-0.5),
        mx.log(mx.random.uniform(1, 16, (heads,))),
        mx.log(mx.exp(steps) - 1),
        norm(dtype, g.linear_value_head_dim),
        g.linear_num_key_heads,
        heads,
        g.linear_key_head_dim,
        g.linear_value_head_dim,
    )


def delta_inputs(dtype: mx.Dtype, g: Geometry, rows: int) -> DeltaInputs:
    """Pieces of one fused projection."""
    widths = (g.conv_channels, g.values, g.linear_num_value_heads, g.linear_num_value_heads)
    fused = normal(dtype, rows, sum(widths))
    starts = np.cumsum([0, *widths[:-1]]).tolist()
    return DeltaInputs(*(Piece(fused, at, w) for at, w in zip(starts, widths, strict=True)))


def delta_state(dtype: mx.Dtype, g: Geometry) -> tuple[mx.array, mx.array]:
    """Convolution rows and recurrent state."""
    heads, value, key = g.linear_num_value_heads, g.linear_value_head_dim, g.linear_key_head_dim
    conv = normal(dtype, g.linear_conv_kernel_dim - 1, g.conv_channels)
    return conv, normal(mx.float32, heads, value, key, scale=0.1)


def of_rows(value: Any, rows: Sequence[int]) -> Any:
    """Row-contiguous rows of an array [rows, n], a Piece, or a tuple of them."""
    if isinstance(value, Piece):
        return Piece(of_rows(value.rows, rows), value.start, value.width)
    if isinstance(value, DeltaInputs):
        fused = of_rows(value.qkv.rows, rows)  # one array for all, as it was
        return DeltaInputs(*(Piece(fused, piece.start, piece.width) for piece in value))
    return mx.contiguous(value[mx.array(list(rows))])


def wide(value: Any) -> Any:
    """The same numbers in float32, packed weights unpacked: what a reference computes with."""
    if isinstance(value, mx.array):
        return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value
    if isinstance(value, Weight):
        if not value.quantized:
            return Weight(wide(value.data))
        data = mx.dequantize(
            value.data,
            wide(value.scales),
            wide(value.biases),
            group_size=value.group_size,
            bits=value.bits,
        )
        return Weight(data)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(wide, value))
    if isinstance(value, list | tuple):
        return type(value)(map(wide, value))
    if is_dataclass(value) and isinstance(
        value, Norm | ExpertWeights | SharedExpert | AttentionShape | DeltaWeights
    ):
        parts = {field.name: wide(getattr(value, field.name)) for field in fields(value)}
        return type(value)(**parts)
    return value
