"""Shapes of the demo pair and the ``config.json`` of both models.

The target is a Qwen3.5-MoE text model (three GatedDeltaNet layers, then one attention layer); the
draft is a z-lab DFlash draft for it. ``tiny()`` gives the same shapes with fewer layers for dry
runs on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from tokenise import EOS_ID, MASK_ID, VOCAB


@dataclass(frozen=True)
class TargetConfig:
    layers: int = 24
    hidden: int = 256
    vocab: int = VOCAB
    experts: int = 32
    top_k: int = 4
    expert_width: int = 64
    shared_width: int = 64
    interval: int = 4  # layer i is full attention when i % interval == interval - 1
    gdn_k_heads: int = 4
    gdn_v_heads: int = 8
    gdn_dim: int = 64
    conv: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    rotary: float = 0.25
    theta: float = 1e7
    eps: float = 1e-6
    max_positions: int = 4096
    group: int = 64
    bits: int = 4
    gate_bits: int = 8

    def is_attention(self, layer: int) -> bool:
        return layer % self.interval == self.interval - 1

    def text_config(self) -> dict[str, Any]:
        kinds = [
            "full_attention" if self.is_attention(i) else "linear_attention"
            for i in range(self.layers)
        ]
        return {
            "model_type": "qwen3_5_moe_text",
            "attention_bias": False,
            "attn_output_gate": True,
            "bos_token_id": None,
            "eos_token_id": EOS_ID,
            "dtype": "bfloat16",
            "full_attention_interval": self.interval,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "layer_types": kinds,
            "linear_conv_kernel_dim": self.conv,
            "linear_key_head_dim": self.gdn_dim,
            "linear_num_key_heads": self.gdn_k_heads,
            "linear_num_value_heads": self.gdn_v_heads,
            "linear_value_head_dim": self.gdn_dim,
            "mamba_ssm_dtype": "float32",
            "max_position_embeddings": self.max_positions,
            "moe_intermediate_size": self.expert_width,
            "norm_topk_prob": True,
            "num_attention_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "partial_rotary_factor": self.rotary,
            "rms_norm_eps": self.eps,
            "rope_parameters": {
                "type": "default",
                "rope_theta": self.theta,
                "partial_rotary_factor": self.rotary,
            },
            "shared_expert_intermediate_size": self.shared_width,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocab,
        }

    def hf_config(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": "qwen3_5_moe",
            "eos_token_id": EOS_ID,
            "pad_token_id": EOS_ID,
            "dtype": "bfloat16",
            "tie_word_embeddings": False,
            "text_config": self.text_config(),
        }


@dataclass(frozen=True)
class DraftConfig:
    layers: int = 2  # of the first training; the third adds one
    hidden: int = 256
    width: int = 1024
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    vocab: int = VOCAB
    block: int = 8
    target_layers: int = 24
    taps: tuple[int, ...] = (1, 6, 11, 16, 21)
    mask_id: int = MASK_ID
    window: int = 256  # of the first layer; the others see everything
    theta: float = 1e7
    yarn_factor: float = 64.0
    yarn_fast: float = 32.0
    yarn_slow: float = 1.0
    yarn_original: int = 4096
    eps: float = 1e-6

    @property
    def rope_scale(self) -> float:
        """YaRN's attention factor, on cos and sin of queries and keys alike."""
        return 0.1 * math.log(self.yarn_factor) + 1.0

    def hf_config(self) -> dict[str, Any]:
        kinds = ["sliding_attention"] + ["full_attention"] * (self.layers - 1)
        return {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "block_size": self.block,
            "dflash_config": {
                "causal": False,
                "mask_token_id": self.mask_id,
                "target_layer_ids": list(self.taps),
            },
            "dtype": "bfloat16",
            "eos_token_id": EOS_ID,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.width,
            "is_causal": False,
            "layer_types": kinds,
            "max_position_embeddings": 262144,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "num_target_layers": self.target_layers,
            "rms_norm_eps": self.eps,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": self.yarn_factor,
                "beta_fast": self.yarn_fast,
                "beta_slow": self.yarn_slow,
                "original_max_position_embeddings": self.yarn_original,
            },
            "rope_theta": self.theta,
            "sliding_window": self.window,
            "tie_word_embeddings": False,
            "use_cache": True,
            "use_sliding_window": True,
            "vocab_size": self.vocab,
        }


def tiny() -> tuple[TargetConfig, DraftConfig]:
    """Four target layers and two taps: every code path, seconds on a CPU."""
    target = replace(TargetConfig(), layers=4)
    return target, replace(DraftConfig(), target_layers=4, taps=(1, 2), window=24)
