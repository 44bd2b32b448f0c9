"""Affine 4 / 8 bit quantisation in MLX's layout, for numpy-free use inside PyTorch.

A row is cut into groups of 64; a group stores ``scale`` and ``bias`` in bfloat16 and its integers
little-endian in uint32 words, so that w = scale * q + bias. The integers are chosen against the
*rounded* scale and bias.
Refused: rows that are no multiple of the group length.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64


def groups(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """(integers [..., G, 64] as float, scales [..., G], biases [..., G]), all float32."""
    if weight.shape[-1] % GROUP:
        raise ValueError(f"row of {weight.shape[-1]} weights is no multiple of {GROUP}")
    top = 2**bits - 1
    w = weight.float().unflatten(-1, (-1, GROUP))
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    flip = low.abs() > high.abs()
    scale = ((high - low) / top).clamp_min(1e-7)
    scale = torch.where(flip, scale, -scale)
    edge = torch.where(flip, low, high)
    q0 = torch.round(edge / scale)
    scale = torch.where(q0 != 0, edge / torch.where(q0 != 0, q0, 1.0), scale)
    bias = torch.where(q0 != 0, edge, 0.0)
    scale, bias = scale.bfloat16().float(), bias.bfloat16().float()
    q = torch.round((w - bias) / scale).clamp(0, top)
    return q, scale.squeeze(-1), bias.squeeze(-1)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """The weight as it will be after quantisation, float32."""
    q, scale, bias = groups(weight, bits)
    return (q * scale.unsqueeze(-1) + bias.unsqueeze(-1)).flatten(-2)


def pack(weight: Tensor, bits: int) -> dict[str, Tensor]:
    """The three stored tensors: ``weight`` (words, as int32), ``scales``, ``biases`` (bfloat16)."""
    q, scale, bias = groups(weight, bits)
    per = 32 // bits
    fields = q.to(torch.int64).flatten(-2).unflatten(-1, (-1, per))
    shifts = torch.arange(per, device=weight.device, dtype=torch.int64) * bits
    words = (fields << shifts).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return {"weight": words, "scales": scale.bfloat16(), "biases": bias.bfloat16()}


def unpack(words: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """Float32 weights of the three stored tensors."""
    per = 32 // bits
    shifts = torch.arange(per, device=words.device, dtype=torch.int64) * bits
    fields = (words.to(torch.int64).unsqueeze(-1) >> shifts) & (2**bits - 1)
    q = fields.flatten(-2).float().unflatten(-1, (-1, GROUP))
    return (q * scales.float().unsqueeze(-1) + biases.float().unsqueeze(-1)).flatten(-2)
