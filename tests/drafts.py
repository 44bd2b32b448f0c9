"""Tiny random DFlash drafts, in the format z-lab publishes.

`write_draft` writes config.json and model.safetensors for a given target's config. Weights are
scaled so that attention is neither flat nor one-hot: position, window and context all show in the
output.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np


def draft_config(target: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """The config.json of a draft for a target with this config.json.

    overrides: top-level keys, or `dflash` with keys of dflash_config; None removes a key.
    """
    text = target.get("text_config", target)
    layers = text["num_hidden_layers"]
    config: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": text["hidden_size"],
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": text["vocab_size"],
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": text["max_position_embeddings"],
        "num_target_layers": layers,
        "block_size": 8,
        "rope_theta": 10000.0,
        "dflash_config": {
            "target_layer_ids": sorted({0, layers // 2, layers - 1}),
            "mask_token_id": text["vocab_size"] - 1,
        },
    }
    dflash = {**config["dflash_config"], **overrides.pop("dflash", {})}
    config = {**config, "dflash_config": dflash, **overrides}
    config["dflash_config"] = {k: v for k, v in dflash.items() if v is not None}
    return {key: value for key, value in config.items() if value is not None}


def draft_tensors(config: Mapping[str, Any], taps: int, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors of a draft by name, without prefix."""
    rng = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    dim = config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim

    def matrix(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
        return rng.normal(0, scale / np.sqrt(columns), (rows, columns)).astype(np.float32)

    def norm(size: int, mean: float = 1.0) -> np.ndarray:
        return rng.normal(mean, 0.1 * mean, size).astype(np.float32)

    tensors = {
        "fc.weight": matrix(hidden, taps * hidden),
        "hidden_norm.weight": norm(hidden),
        "norm.weight": norm(hidden),
    }
    for i in range(config["num_hidden_layers"]):
        at = f"layers.{i}"
        tensors |= {
            f"{at}.input_layernorm.weight": norm(hidden),
            f"{at}.post_attention_layernorm.weight": norm(hidden),
            f"{at}.self_attn.q_proj.weight": matrix(queries, hidden),
            f"{at}.self_attn.k_proj.weight": matrix(keys, hidden),
            f"{at}.self_attn.v_proj.weight": matrix(keys, hidden, 3.0),
            f"{at}.self_attn.o_proj.weight": matrix(hidden, queries, 3.0),
            f"{at}.self_attn.q_norm.weight": norm(dim, 1.5),
            f"{at}.self_attn.k_norm.weight": norm(dim, 1.5),
            f"{at}.mlp.gate_proj.weight": matrix(inner, hidden),
            f"{at}.mlp.up_proj.weight": matrix(inner, hidden),
            f"{at}.mlp.down_proj.weight": matrix(hidden, inner, 2.0),
        }
    return tensors


def write_draft(
    folder: Path,
    target_config: Mapping[str, Any],
    *,
    quantize: tuple[int, int] | None = None,
    dtype: str = "bfloat16",
    prefix: str = "",
    seed: int = 0,
    extra: Mapping[str, mx.array] | None = None,
    **overrides: Any,
) -> Path:
    """Write a draft for a target (its config.json as a dictionary) and return the folder.

    quantize: (bits, group size) of the matrices whose inputs the group size divides.
    dtype: of everything else. prefix: "model." as some converters write it.
    extra: further tensors. overrides: keywords of `draft_config`.
    """
    config = draft_config(target_config, **overrides)
    taps = len(config["dflash_config"].get("target_layer_ids", range(config["num_hidden_layers"])))
    tensors: dict[str, mx.array] = {}
    for name, values in draft_tensors(config, taps, seed).items():
        array = mx.array(values).astype(getattr(mx, dtype))
        path = (prefix + name).removesuffix(".weight")
        if quantize and values.ndim == 2 and values.shape[-1] % quantize[1] == 0:
            bits, group_size = quantize
            array, scales, biases = mx.quantize(array, group_size=group_size, bits=bits)
            tensors |= {f"{path}.scales": scales, f"{path}.biases": biases}
        tensors[f"{path}.weight"] = array
    if quantize:
        config["quantization"] = {"bits": quantize[0], "group_size": quantize[1], "mode": "affine"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    file = str(folder / "model.safetensors")
    mx.save_safetensors(file, {**tensors, **(extra or {})}, {"format": "mlx"})
    return folder
