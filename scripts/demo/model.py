"""The target: a compact Qwen3.5-MoE text model whose parameter names are the checkpoint's.

Whole sequences go through ``Target.forward`` (training, scoring, hidden states for the draft);
single tokens go through ``Target.step`` with an explicit state (regeneration). Experts are so
narrow that all of them are computed as one wide SwiGLU whose columns are multiplied by the routing
weights (zero for experts not chosen): the same function with three large products.
Refused: attention masks and sequence lengths that are no multiple of the delta rule's chunk.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import delta
from config import TargetConfig


class Weight(nn.Module):
    """A parameter named ``weight``; calling it casts it to the type to compute in."""

    def __init__(self, *shape: int, std: float, bits: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) * std)
        self.bits = bits  # of the exported tensor; 0: not quantised

    def forward(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)


class Norm(nn.Module):
    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first 2 * cos.shape[-1] channels of [..., D] (halves, NeoX order)."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class DeltaNet(nn.Module):
    def __init__(self, cfg: TargetConfig) -> None:
        super().__init__()
        self.cfg = cfg
        h, d = cfg.hidden, cfg.gdn_dim
        self.key, self.value = cfg.gdn_k_heads * d, cfg.gdn_v_heads * d
        channels, std = 2 * self.key + self.value, h**-0.5
        self.in_proj_qkv = Weight(channels, h, std=std, bits=cfg.bits)
        self.in_proj_z = Weight(self.value, h, std=std, bits=cfg.bits)
        self.in_proj_b = Weight(cfg.gdn_v_heads, h, std=std, bits=cfg.bits)
        self.in_proj_a = Weight(cfg.gdn_v_heads, h, std=std, bits=cfg.bits)
        self.conv1d = Weight(channels, cfg.conv, 1, std=0.3)
        self.out_proj = Weight(h, self.value, std=0.3 * self.value**-0.5, bits=cfg.bits)
        self.norm = Norm(d, cfg.eps)
        self.A_log = nn.Parameter(torch.empty(cfg.gdn_v_heads).uniform_(1, 16).log())
        dt = torch.exp(torch.empty(cfg.gdn_v_heads).uniform_(math.log(1e-3), math.log(0.1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = (self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a)
        all_rows = torch.cat([part(x.dtype) for part in parts])
        heads = self.cfg.gdn_v_heads
        out = F.linear(x, all_rows)
        qkv, z, b, a = out.split([2 * self.key + self.value, self.value, heads, heads], -1)
        log_g = -self.A_log.exp() * F.softplus(a.float() + self.dt_bias)
        return qkv, z, b.float().sigmoid(), log_g

    def heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Convolved channels [..., C] -> q, k [..., Hk, D] and v [..., Hv, D], float32."""
        d = self.cfg.gdn_dim
        q, k, v = F.silu(mixed).split([self.key, self.key, self.value], -1)
        q = delta.unit(q.unflatten(-1, (-1, d))) * d**-0.5
        k = delta.unit(k.unflatten(-1, (-1, d)))
        return q, k, v.unflatten(-1, (-1, d))

    def close(self, y: Tensor, z: Tensor) -> Tensor:
        gate = F.silu(z.float()).unflatten(-1, (-1, self.cfg.gdn_dim))
        return F.linear((self.norm(y) * gate).flatten(-2).to(z.dtype), self.out_proj(z.dtype))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv, z, beta, log_g = self.project(x)
        taps = self.conv1d(torch.float32).squeeze(-1)  # [C, K]
        padded = F.pad(qkv, (0, 0, self.cfg.conv - 1, 0))
        length = x.shape[1]
        mixed = sum(padded[:, i : i + length].float() * taps[:, i] for i in range(self.cfg.conv))
        q, k, v = (part.to(x.dtype) for part in self.heads(mixed))
        return self.close(delta.chunked(q, k, v, log_g, beta), z)

    def step(self, x: Tensor, state: list[Tensor], cos: Tensor, sin: Tensor, at: Tensor) -> Tensor:
        conv, memory = state  # [B, K-1, C], [B, Hv, D, D]
        qkv, z, beta, log_g = self.project(x)
        begins = (at == 0).unsqueeze(1)  # what the row held before is of another text
        log_g = log_g.masked_fill(begins, -1e4)
        window = torch.cat([conv.masked_fill(begins.unsqueeze(2), 0), qkv.unsqueeze(1)], 1)
        mixed = (window.float() * self.conv1d(torch.float32).squeeze(-1).T).sum(1)
        y, new = delta.step(*self.heads(mixed), log_g, beta, memory)
        conv.copy_(window[:, 1:])
        memory.copy_(new)
        return self.close(y, z)

    def state(self, batch: int, length: int, like: Tensor, dtype: torch.dtype) -> list[Tensor]:
        cfg, make = self.cfg, like.new_zeros
        conv = make(batch, cfg.conv - 1, 2 * self.key + self.value, dtype=dtype)
        return [conv, make(batch, cfg.gdn_v_heads, cfg.gdn_dim, cfg.gdn_dim, dtype=torch.float32)]


class Attention(nn.Module):
    def __init__(self, cfg: TargetConfig) -> None:
        super().__init__()
        self.cfg = cfg
        h, d, std = cfg.hidden, cfg.head_dim, cfg.hidden**-0.5
        self.q_proj = Weight(2 * cfg.heads * d, h, std=std, bits=cfg.bits)
        self.k_proj = Weight(cfg.kv_heads * d, h, std=std, bits=cfg.bits)
        self.v_proj = Weight(cfg.kv_heads * d, h, std=std, bits=cfg.bits)
        self.o_proj = Weight(h, cfg.heads * d, std=0.3 * (cfg.heads * d) ** -0.5, bits=cfg.bits)
        self.q_norm, self.k_norm = Norm(d, cfg.eps), Norm(d, cfg.eps)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """x [..., H] -> q [..., heads, D], gate [..., heads * D], k, v [..., kv_heads, D]."""
        cfg = self.cfg
        rows = torch.cat([self.q_proj(x.dtype), self.k_proj(x.dtype), self.v_proj(x.dtype)])
        width = cfg.kv_heads * cfg.head_dim
        qg, k, v = F.linear(x, rows).split([rows.shape[0] - 2 * width, width, width], -1)
        q, gate = qg.unflatten(-1, (cfg.heads, 2 * cfg.head_dim)).chunk(2, -1)
        q = rope(self.q_norm(q), cos, sin).to(x.dtype)
        k = rope(self.k_norm(k.unflatten(-1, (-1, cfg.head_dim))), cos, sin).to(x.dtype)
        return q, gate.flatten(-2), k, v.unflatten(-1, (-1, cfg.head_dim))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, gate, k, v = self.project(x, cos[:, None], sin[:, None])
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y = y.transpose(1, 2).flatten(-2) * gate.sigmoid()
        return F.linear(y, self.o_proj(x.dtype))

    def step(self, x: Tensor, state: list[Tensor], cos: Tensor, sin: Tensor, at: Tensor) -> Tensor:
        keys, values = state  # [B, kv_heads, L, D]
        q, gate, k, v = self.project(x, cos, sin)
        rows = torch.arange(len(x), device=x.device)
        keys[rows, :, at] = k
        values[rows, :, at] = v
        q = q.unflatten(1, (self.cfg.kv_heads, -1))  # [B, G, heads / G, D]
        scores = (q @ keys.mT).float() * self.cfg.head_dim**-0.5
        hidden = torch.arange(keys.shape[2], device=x.device) > at[:, None, None, None]
        scores = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(x.dtype)
        y = (scores @ values).flatten(1) * gate.sigmoid()
        return F.linear(y, self.o_proj(x.dtype))

    def state(self, batch: int, length: int, like: Tensor, dtype: torch.dtype) -> list[Tensor]:
        shape = (batch, self.cfg.kv_heads, length, self.cfg.head_dim)
        return [like.new_zeros(shape, dtype=dtype), like.new_zeros(shape, dtype=dtype)]


class SwiGLU(nn.Module):
    """The three matrices of one expert, or of a stack of them."""

    def __init__(self, cfg: TargetConfig, width: int, *stack: int) -> None:
        super().__init__()
        h = cfg.hidden
        self.gate_proj = Weight(*stack, width, h, std=h**-0.5, bits=cfg.bits)
        self.up_proj = Weight(*stack, width, h, std=h**-0.5, bits=cfg.bits)
        self.down_proj = Weight(*stack, h, width, std=0.3 * width**-0.5, bits=cfg.bits)


class Experts(nn.Module):
    def __init__(self, cfg: TargetConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.gate = Weight(cfg.experts, cfg.hidden, std=0.02, bits=cfg.gate_bits)
        self.switch_mlp = SwiGLU(cfg, cfg.expert_width, cfg.experts)
        self.shared_expert = SwiGLU(cfg, cfg.shared_width)
        self.shared_expert_gate = Weight(1, cfg.hidden, std=0.02, bits=cfg.gate_bits)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., H] -> weights [..., E] (zero where not chosen), load, load-balance loss."""
        probs = F.linear(x.float(), self.gate(torch.float32)).softmax(-1)
        order = torch.arange(self.cfg.experts, device=x.device)
        mine, other = probs.detach().unsqueeze(-1), probs.detach().unsqueeze(-2)
        ahead = (other > mine) | ((other == mine) & (order < order.unsqueeze(-1)))
        chosen = ahead.sum(-1) < self.cfg.top_k  # rank by counting: no top-k kernel
        kept = probs * chosen
        flat = chosen.float().flatten(0, -2)
        load = flat.mean(0) / self.cfg.top_k
        balance = self.cfg.experts * (load * probs.flatten(0, -2).mean(0)).sum()
        return kept / kept.sum(-1, keepdim=True), load, balance

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cfg, kind = self.cfg, x.dtype
        mix, load, balance = self.route(x)
        share = F.linear(x.float(), self.shared_expert_gate(torch.float32)).sigmoid()
        many, one = self.switch_mlp, self.shared_expert
        gate_rows = torch.cat([many.gate_proj(kind).flatten(0, 1), one.gate_proj(kind)])
        up_rows = torch.cat([many.up_proj(kind).flatten(0, 1), one.up_proj(kind)])
        down = many.down_proj(kind).movedim(0, 1).flatten(1)  # [H, E * width]
        down = torch.cat([down, one.down_proj(kind)], 1)
        inner = F.silu(F.linear(x, gate_rows)) * F.linear(x, up_rows)
        scale = torch.cat(
            [
                mix.repeat_interleave(cfg.expert_width, -1),
                share.expand(*share.shape[:-1], cfg.shared_width),
            ],
            -1,
        )
        return F.linear((inner.float() * scale).to(kind), down), load, balance


class Layer(nn.Module):
    def __init__(self, cfg: TargetConfig, index: int) -> None:
        super().__init__()
        self.attends = cfg.is_attention(index)
        if self.attends:
            self.self_attn = Attention(cfg)
        else:
            self.linear_attn = DeltaNet(cfg)
        self.mlp = Experts(cfg)
        self.input_layernorm = Norm(cfg.hidden, cfg.eps)
        self.post_attention_layernorm = Norm(cfg.hidden, cfg.eps)

    @property
    def mixer(self) -> Attention | DeltaNet:
        return self.self_attn if self.attends else self.linear_attn

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.mixer(self.input_layernorm(x).to(dtype), cos, sin)
        y, load, balance = self.mlp(self.post_attention_layernorm(x).to(dtype))
        return x + y, load, balance

    def step(
        self,
        x: Tensor,
        state: list[Tensor],
        cos: Tensor,
        sin: Tensor,
        at: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        x = x + self.mixer.step(self.input_layernorm(x).to(dtype), state, cos, sin, at)
        return x + self.mlp(self.post_attention_layernorm(x).to(dtype))[0]


class Body(nn.Module):
    def __init__(self, cfg: TargetConfig) -> None:
        super().__init__()
        self.embed_tokens = Weight(cfg.vocab, cfg.hidden, std=0.5, bits=cfg.bits)
        self.layers = nn.ModuleList(Layer(cfg, i) for i in range(cfg.layers))
        self.norm = Norm(cfg.hidden, cfg.eps)


class Target(nn.Module):
    """``dtype`` is what products run in; the residual stream and the delta rule stay float32."""

    def __init__(self, cfg: TargetConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        self.model = Body(cfg)
        self.lm_head = Weight(cfg.vocab, cfg.hidden, std=cfg.hidden**-0.5, bits=cfg.bits)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        dim = int(self.cfg.head_dim * self.cfg.rotary)
        power = torch.arange(0, dim, 2, device=positions.device) / dim
        angle = positions.float().unsqueeze(-1) * self.cfg.theta**-power
        return angle.cos(), angle.sin()

    def embed(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.model.embed_tokens(torch.float32))

    def forward(
        self, ids: Tensor, taps: tuple[int, ...] = ()
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """ids [B, T] -> normed hidden [B, T, H], outputs of the tapped layers, loads, balance."""
        cos, sin = self.angles(torch.arange(ids.shape[1], device=ids.device))
        x, seen, loads, losses = self.embed(ids), [], [], []
        for i, layer in enumerate(self.model.layers):
            x, load, balance = layer(x, cos, sin, self.dtype)
            loads.append(load)
            losses.append(balance)
            if i in taps:
                seen.append(x)
        return self.model.norm(x), seen, torch.stack(loads), torch.stack(losses).mean()

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.to(self.dtype), self.lm_head(self.dtype))

    def step(self, ids: Tensor, states: list[list[Tensor]], at: Tensor) -> Tensor:
        """ids [B] at positions ``at`` [B] -> logits [B, V]; the states are updated in place.

        A row at position 0 begins a new text.
        """
        cos, sin = (t.unsqueeze(1) for t in self.angles(at))
        x = self.embed(ids)
        for layer, state in zip(self.model.layers, states, strict=True):
            x = layer.step(x, state, cos, sin, at, self.dtype)
        return self.logits(self.model.norm(x))

    def states(self, batch: int, length: int) -> list[list[Tensor]]:
        like = self.lm_head.weight
        return [layer.mixer.state(batch, length, like, self.dtype) for layer in self.model.layers]
