"""The checkpoint of the benchmark: Qwen3.6-35B-A3B's geometry, fewer layers, random weights.

Three folders: `model` as mlx-community writes it (scripts/gpu/geometry.py), `repacked` by
`specdec repack`, `draft` in z-lab's format. A marker written last says of what they are: what is
there is used again, and what is not finished, or is of another geometry, is made anew.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from scripts.gpu.geometry import REAL, TINY, Geometry, config_of, write_model

MARKER = "bench_streaming.json"
# z-lab's draft has 8 layers for the target's 40, a block of 16 and five taps: cut as the target is.
BLOCK = 8
REAL_DRAFT = {"layers": 2, "block": BLOCK, "heads": 32, "kv_heads": 8, "dim": 128, "inner": 6144}
TINY_DRAFT = {"layers": 1, "block": BLOCK, "heads": 2, "kv_heads": 1, "dim": 64, "inner": 128}


@dataclass(frozen=True)
class Folders:
    """What was written."""

    model: Path
    repacked: Path
    draft: Path


def geometry(layers: int, tiny: bool) -> Geometry:
    """Of the target; the tiny one has experts enough that an eighth of them is more than top-k."""
    if tiny:
        return replace(TINY, num_hidden_layers=layers, num_experts=32, num_experts_per_tok=2)
    return replace(REAL, num_hidden_layers=layers)


def prepare(folder: Path, layers: int, tiny: bool) -> Folders:
    """Write what is not there yet."""
    target, draft = geometry(layers, tiny), TINY_DRAFT if tiny else REAL_DRAFT
    folders = Folders(folder / "model", folder / "repacked", folder / "draft")
    says = {"target": asdict(target), "draft": draft}
    marker = folder / MARKER
    if marker.exists() and json.loads(marker.read_text()) == says:
        return folders
    folder.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    for old in (folders.model, folders.repacked, folders.draft):
        if old.exists():
            shutil.rmtree(old)
    write_model(folders.model, target)
    command = [sys.executable, "-m", "specdec", "repack"]
    subprocess.run([*command, str(folders.model), str(folders.repacked)], check=True)
    write_draft(folders.draft, target, draft)
    marker.write_text(json.dumps(says))
    return folders


def write_draft(folder: Path, target: Geometry, draft: dict[str, int]) -> None:
    """A DFlash draft of random weights; what it proposes is noise, what it costs is real."""
    folder.mkdir(parents=True)
    hidden, layers, taps = target.hidden_size, draft["layers"], min(5, target.num_hidden_layers)
    config: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": draft["heads"],
        "num_key_value_heads": draft["kv_heads"],
        "head_dim": draft["dim"],
        "intermediate_size": draft["inner"],
        "vocab_size": target.vocab_size,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": config_of(target)["text_config"]["max_position_embeddings"],
        "num_target_layers": target.num_hidden_layers,
        "block_size": draft["block"],
        "rope_theta": 10000000.0,
        "dflash_config": {
            "target_layer_ids": np.linspace(0, target.num_hidden_layers - 1, taps)
            .astype(int)
            .tolist(),
            "mask_token_id": target.vocab_size - 1,
        },
    }
    rng = np.random.default_rng(0)
    queries, keys = draft["heads"] * draft["dim"], draft["kv_heads"] * draft["dim"]
    shapes = {"fc": (hidden, taps * hidden)}
    norms = {"hidden_norm": hidden, "norm": hidden}
    for layer in range(layers):
        at = f"layers.{layer}"
        norms |= {f"{at}.{name}_layernorm": hidden for name in ("input", "post_attention")}
        norms |= {f"{at}.self_attn.{name}_norm": draft["dim"] for name in ("q", "k")}
        shapes |= {
            f"{at}.self_attn.q_proj": (queries, hidden),
            f"{at}.self_attn.k_proj": (keys, hidden),
            f"{at}.self_attn.v_proj": (keys, hidden),
            f"{at}.self_attn.o_proj": (hidden, queries),
            f"{at}.mlp.gate_proj": (draft["inner"], hidden),
            f"{at}.mlp.up_proj": (draft["inner"], hidden),
            f"{at}.mlp.down_proj": (hidden, draft["inner"]),
        }
    tensors = {name: mx.ones((size,), mx.bfloat16) for name, size in norms.items()}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)
        tensors[name] = mx.array(values).astype(mx.bfloat16)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    named = {f"{name}.weight": tensor for name, tensor in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), named, {"format": "mlx"})
