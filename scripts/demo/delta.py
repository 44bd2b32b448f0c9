"""The gated delta rule: a chunked form for whole sequences and one recurrent step.

S_t = g_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T and y_t = S_t q_t, with the state kept
in float32. The chunked form inverts one unit lower triangular matrix a chunk and then carries the
state from chunk to chunk with a single product each, so its sequential part is T / 64 steps.
Refused: sequence lengths that are no multiple of 64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 64


def unit(x: Tensor) -> Tensor:
    """x / |x| on the last axis, with the reference epsilon inside the root."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


class Inverse(torch.autograd.Function):
    """(I + L)^-1 of strictly lower triangular L [..., C, C]; its gradient needs no second solve."""

    @staticmethod
    def forward(ctx: Any, lower: Tensor) -> Tensor:
        eye = torch.eye(lower.shape[-1], device=lower.device, dtype=lower.dtype)
        out = torch.linalg.solve_triangular(
            lower, eye.expand_as(lower), upper=False, unitriangular=True
        )
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return -(out.mT @ grad @ out.mT)


def chunked(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor) -> Tensor:
    """Outputs of a whole sequence that starts from a zero state.

    q, k: [B, T, Hk, D] of unit length, q scaled; v: [B, T, Hv, D], Hv a multiple of Hk; log_g,
    beta: [B, T, Hv] float32. Products run in q's type. Returns [B, T, Hv, D].
    """
    kind, dim = q.dtype, q.shape[-1]
    n = q.shape[1] // CHUNK

    def split(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [B, H, N, C, ...]
        return x.unflatten(1, (n, CHUNK)).movedim(3, 1)

    q, k = split(q), split(k)  # [B, Hk, N, C, D]
    per = (k.shape[1], v.shape[2] // k.shape[1])
    v, log_g, beta = (split(x).unflatten(1, per) for x in (v, log_g, beta))  # [B, Hk, R, N, C, ..]
    g = log_g.cumsum(-1)
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    decay = (g.unsqueeze(-1) - g.unsqueeze(-2)).masked_fill(~lower, -1e4).exp()
    gram = (k @ k.mT).unsqueeze(2).float()
    inverse = Inverse.apply((gram * decay * beta.unsqueeze(-1)).tril(-1)).to(kind)
    k, q_wide = k.unsqueeze(2).float(), q.unsqueeze(2).float()
    rhs = torch.cat([v.float() * beta.unsqueeze(-1), k * (beta * g.exp()).unsqueeze(-1)], -1)
    u, w = (inverse @ rhs.to(kind)).split(dim, -1)  # [B, Hk, R, N, C, D] each
    end = g[..., -1:]
    k_end = (k * (end - g).exp().unsqueeze(-1)).to(kind).mT  # [B, Hk, R, N, D, C]
    eye = torch.eye(dim, device=q.device)
    both = (k_end @ torch.cat([w, u], -1)).float()
    carry = end.exp().unsqueeze(-1) * eye - both[..., :dim]  # [B, Hk, R, N, Dk, Dk]
    add = both[..., dim:]  # [B, Hk, R, N, Dk, Dv]
    state = torch.zeros_like(add[:, :, :, 0])
    states = [state]
    for i in range(n - 1):
        state = carry[:, :, :, i] @ state + add[:, :, :, i]
        states.append(state)
    before = torch.stack(states, 3).to(kind)  # state at the start of every chunk
    inner = ((q @ k.squeeze(2).to(kind).mT).unsqueeze(2).float() * decay).to(kind)
    fresh = u - w @ before
    out = (q_wide * g.exp().unsqueeze(-1)).to(kind) @ before + inner @ fresh
    return out.flatten(1, 2).movedim(1, 3).flatten(1, 2)


def step(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token. q, k: [B, Hk, D]; v: [B, Hv, D]; log_g, beta: [B, Hv]; state [B, Hv, Dv, Dk]."""
    per = v.shape[1] // k.shape[1]
    q, k = q.repeat_interleave(per, 1), k.repeat_interleave(per, 1)
    state = state * log_g.exp()[..., None, None]
    seen = (state * k.unsqueeze(-2)).sum(-1)  # [B, Hv, Dv]
    delta = (v - seen) * beta.unsqueeze(-1)
    state = state + delta.unsqueeze(-1) * k.unsqueeze(-2)
    return (state * q.unsqueeze(-2)).sum(-1), state
