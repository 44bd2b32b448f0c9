"""The DFlash draft: block diffusion over 8 slots, conditioned on tapped target layers.

Parameter names are z-lab's. The forward pass takes many blocks at once, each at its own anchor of
the same sequence: a block sees the context rows before its anchor (inside the window on the
sliding layer) and all rows of itself. Embedding and output matrix are the target's.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from config import DraftConfig
from model import Norm, Weight, rope


def inverse_frequencies(cfg: DraftConfig) -> Tensor:
    """YaRN's frequencies, [head_dim / 2]."""
    dim, base = cfg.head_dim, cfg.theta

    def corner(turns: float) -> float:
        return dim * math.log(cfg.yarn_original / (2 * math.pi * turns)) / (2 * math.log(base))

    low = max(math.floor(corner(cfg.yarn_fast)), 0)
    high = min(math.ceil(corner(cfg.yarn_slow)), dim - 1)
    steps = torch.arange(dim // 2, dtype=torch.float32)
    ramp = ((steps - low) / max(high - low, 0.001)).clamp(0, 1)
    return base ** (-2 * steps / dim) * ((1 - ramp) + ramp / cfg.yarn_factor)


class Attention(nn.Module):
    def __init__(self, cfg: DraftConfig) -> None:
        super().__init__()
        self.cfg = cfg
        h, d, std = cfg.hidden, cfg.head_dim, cfg.hidden**-0.5
        self.q_proj = Weight(cfg.heads * d, h, std=std)
        self.k_proj = Weight(cfg.kv_heads * d, h, std=std)
        self.v_proj = Weight(cfg.kv_heads * d, h, std=std)
        self.o_proj = Weight(h, cfg.heads * d, std=0.3 * (cfg.heads * d) ** -0.5)
        self.q_norm, self.k_norm = Norm(d, cfg.eps), Norm(d, cfg.eps)

    def forward(self, n: Tensor, c: Tensor, turn_n: Tensor, turn_c: Tensor, mask: Tensor) -> Tensor:
        """n [B, Q, H] block rows, c [B, T, H] context rows; turns: (cos, sin) stacked on dim 0."""
        d, kind = self.cfg.head_dim, n.dtype
        rows = torch.cat([c, n], 1)
        q = F.linear(n, self.q_proj(kind)).unflatten(-1, (-1, d))
        k = F.linear(rows, self.k_proj(kind)).unflatten(-1, (-1, d))
        v = F.linear(rows, self.v_proj(kind)).unflatten(-1, (-1, d))
        turn_k = torch.cat([turn_c, turn_n], 2)
        q = rope(self.q_norm(q), turn_n[0].unsqueeze(2), turn_n[1].unsqueeze(2)).to(kind)
        k = rope(self.k_norm(k), turn_k[0].unsqueeze(2), turn_k[1].unsqueeze(2)).to(kind)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        per = self.cfg.heads // self.cfg.kv_heads
        k, v = k.repeat_interleave(per, 1), v.repeat_interleave(per, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return F.linear(y.transpose(1, 2).flatten(-2), self.o_proj(kind))


class Mlp(nn.Module):
    def __init__(self, cfg: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = Weight(cfg.width, cfg.hidden, std=cfg.hidden**-0.5)
        self.up_proj = Weight(cfg.width, cfg.hidden, std=cfg.hidden**-0.5)
        self.down_proj = Weight(cfg.hidden, cfg.width, std=0.3 * cfg.width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.dtype
        inner = F.silu(F.linear(x, self.gate_proj(kind))) * F.linear(x, self.up_proj(kind))
        return F.linear(inner, self.down_proj(kind))


class Layer(nn.Module):
    def __init__(self, cfg: DraftConfig) -> None:
        super().__init__()
        self.self_attn = Attention(cfg)
        self.mlp = Mlp(cfg)
        self.input_layernorm = Norm(cfg.hidden, cfg.eps)
        self.post_attention_layernorm = Norm(cfg.hidden, cfg.eps)

    def forward(self, x: Tensor, c: Tensor, turn_n: Tensor, turn_c: Tensor, mask: Tensor) -> Tensor:
        n = self.input_layernorm(x).to(c.dtype)
        x = x + self.self_attn(n, c, turn_n, turn_c, mask)
        return x + self.mlp(self.post_attention_layernorm(x).to(c.dtype))


class Draft(nn.Module):
    def __init__(self, cfg: DraftConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        wide = len(cfg.taps) * cfg.hidden
        self.fc = Weight(cfg.hidden, wide, std=wide**-0.5)
        self.hidden_norm = Norm(cfg.hidden, cfg.eps)
        self.norm = Norm(cfg.hidden, cfg.eps)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.layers))
        self.register_buffer("frequencies", inverse_frequencies(cfg), persistent=False)

    def turns(self, positions: Tensor) -> Tensor:
        """positions [B, N] -> cos and sin times the attention factor, [2, B, N, D / 2]."""
        angle = positions.float().unsqueeze(-1) * self.frequencies
        return torch.stack([angle.cos(), angle.sin()]) * self.cfg.rope_scale

    def masks(self, anchors: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Visible keys [B, 1, Q, T + Q] of a sliding and of a full layer; anchors [B, A]."""
        batch, count = anchors.shape
        block = self.cfg.block
        at = anchors.repeat_interleave(block, 1).unsqueeze(-1)  # [B, Q, 1]
        offset = torch.arange(block, device=anchors.device).repeat(count)
        context = torch.arange(length, device=anchors.device)  # [T]
        full = context < at
        near = full & (at + offset[None, :, None] - context < self.cfg.window)
        owner = torch.arange(count, device=anchors.device).repeat_interleave(block)
        own = (owner[:, None] == owner).expand(batch, -1, -1)
        return (torch.cat([near, own], -1).unsqueeze(1), torch.cat([full, own], -1).unsqueeze(1))

    def forward(self, taps: Tensor, bonus: Tensor, mask_row: Tensor, anchors: Tensor) -> Tensor:
        """Hidden rows of all slots.

        taps: [B, T, n * H] target layer outputs; bonus: [B, A, H] embeddings of the anchor tokens;
        mask_row: [H] embedding of the mask token; anchors: [B, A]. Returns [B, A, block, H].
        """
        batch, count = anchors.shape
        block, length = self.cfg.block, taps.shape[1]
        c = self.hidden_norm(F.linear(taps.to(self.dtype), self.fc(self.dtype))).to(self.dtype)
        filler = mask_row.expand(batch, count, block - 1, -1)
        x = torch.cat([bonus.unsqueeze(2), filler], 2).flatten(1, 2).float()  # [B, Q, H]
        offset = torch.arange(block, device=anchors.device)
        turn_n = self.turns((anchors.unsqueeze(-1) + offset).flatten(1))
        turn_c = self.turns(torch.arange(length, device=anchors.device).expand(batch, -1))
        sliding, full = self.masks(anchors, length)
        for i, layer in enumerate(self.layers):
            x = layer(x, c, turn_n, turn_c, sliding if i == 0 else full)
        return self.norm(x).unflatten(1, (count, block))


def save_draft(draft: Draft, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.bfloat16().contiguous().cpu() for k, v in draft.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(draft.cfg.hf_config(), indent=1) + "\n")


def load_draft(folder: Path, dtype: torch.dtype, device: str, layers: int = 0) -> Draft:
    """A draft with the weights of a folder written by ``save_draft``.

    With more ``layers`` than the folder's, new ones go before the last one. They add nothing to the
    residual stream, so that the draft is the same function until it is trained.
    """
    text = json.loads((folder / "config.json").read_text())
    taps = tuple(text["dflash_config"]["target_layer_ids"])
    cfg = DraftConfig(
        layers=text["num_hidden_layers"],
        target_layers=text["num_target_layers"],
        taps=taps,
        window=text["sliding_window"],
    )
    if text != cfg.hf_config():
        raise ValueError(f"{folder}/config.json is not a demo draft")
    draft = Draft(cfg, dtype)
    weights = load_file(folder / "model.safetensors")
    draft.load_state_dict({k: v.float() for k, v in weights.items()})
    for _ in range(cfg.layers, layers):
        layer = Layer(cfg)
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
        draft.layers.insert(len(draft.layers) - 1, layer)
    draft.cfg = replace(cfg, layers=len(draft.layers))
    return draft.to(device)
