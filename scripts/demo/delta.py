"""The gated delta rule: a chunked form for whole sequences and one recurrent step.

S_t = g_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T and y_t = S_t q_t, with the state kept
in float32. The chunked form solves one unit lower triangular system a chunk and then carries the
state from chunk to chunk with a single product each, so its sequential part is T / 64 steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 64


def unit(x: Tensor) -> Tensor:
    """x / |x| on the last axis, with the reference epsilon inside the root."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def chunked(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor) -> Tensor:
    """Outputs of a whole sequence that starts from a zero state.

    q, k, v: [B, T, H, D] float32 with q, k of unit length and q scaled; log_g, beta: [B, T, H].
    Returns [B, T, H, D]. T must be a multiple of the chunk length.
    """
    batch, length, heads, dim = q.shape
    n = length // CHUNK

    def split(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [B, H, N, C, ...]
        return x.unflatten(1, (n, CHUNK)).movedim(3, 1)

    q, k, v, log_g, beta = map(split, (q, k, v, log_g, beta))
    g = log_g.cumsum(-1)  # [B, H, N, C]
    lower = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    decay = (g.unsqueeze(-1) - g.unsqueeze(-2)).masked_fill(~lower, -1e4).exp()
    k_beta = k * beta.unsqueeze(-1)
    system = ((k_beta @ k.transpose(-1, -2)) * decay).tril(-1)  # strictly lower, unit diagonal
    rhs = torch.cat([v * beta.unsqueeze(-1), k_beta * g.unsqueeze(-1).exp()], -1)
    solved = torch.linalg.solve_triangular(system, rhs, upper=False, unitriangular=True)
    u, w = solved.split(dim, -1)  # [B, H, N, C, D] each
    end = g[..., -1:]
    k_end = (k * (end - g).unsqueeze(-1).exp()).transpose(-1, -2)  # [B, H, N, D, C]
    eye = torch.eye(dim, device=q.device, dtype=q.dtype)
    carry = end.unsqueeze(-1).exp() * eye - k_end @ w  # [B, H, N, Dk, Dk]
    add = k_end @ u  # [B, H, N, Dk, Dv]
    state = torch.zeros_like(add[:, :, 0])
    states = []
    for i in range(n):
        states.append(state)
        if i + 1 < n:
            state = carry[:, :, i] @ state + add[:, :, i]
    before = torch.stack(states, 2)  # state at the start of every chunk, [B, H, N, Dk, Dv]
    inner = (q @ k.transpose(-1, -2)) * decay
    out = (q * g.unsqueeze(-1).exp()) @ before + inner @ (u - w @ before)
    return out.movedim(1, 3).flatten(1, 2)


def step(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token. q, k, v: [B, H, D]; log_g, beta: [B, H]; state: [B, H, Dv, Dk] float32."""
    state = state * log_g.exp()[..., None, None]
    seen = (state * k.unsqueeze(-2)).sum(-1)  # [B, H, Dv]
    delta = (v - seen) * beta.unsqueeze(-1)
    state = state + delta.unsqueeze(-1) * k.unsqueeze(-2)
    return (state * q.unsqueeze(-2)).sum(-1), state
