"""Write and read the target in the mlx-community layout: 4 bits, group 64, routers at 8 bits.

``save`` quantises a trained model and writes safetensors files below 16 MB with their index,
``config.json`` and the tokenizer's files; ``load`` reads such a folder back into a PyTorch model
whose weights are exactly the dequantised ones. ``python scripts/demo/export.py --out DIR
--tokenizer DIR`` writes a randomly initialised pair, to develop loaders against.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import quantise
from config import DraftConfig, TargetConfig
from draft import Draft, save_draft
from model import Target, Weight

PREFIX = "language_model."
FILE_LIMIT = 15_500_000  # bytes of tensors in one file
KEEP_FLOAT32 = ("A_log",)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def tensors(model: Target, quantised: bool = True) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Checkpoint tensors and the ``quantization`` table (empty when not quantised)."""
    cfg = model.cfg
    out: dict[str, Tensor] = {}
    table: dict[str, object] = {"group_size": cfg.group, "bits": cfg.bits, "mode": "affine"}
    bits = {name: m.bits for name, m in model.named_modules() if isinstance(m, Weight) and m.bits}
    for name, value in model.state_dict().items():
        path = name.removesuffix(".weight")
        if path in bits and quantised:
            for part, tensor in quantise.pack(value, bits[path]).items():
                out[f"{PREFIX}{path}.{part}"] = tensor.contiguous().cpu()
            if bits[path] != cfg.bits:
                table[PREFIX + path] = {"group_size": cfg.group, "bits": bits[path]}
        elif quantised and not name.endswith(KEEP_FLOAT32):
            out[PREFIX + name] = value.bfloat16().contiguous().cpu()
        else:
            out[PREFIX + name] = value.float().contiguous().cpu()
    return out, table if quantised else {}


def shards(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in weights.items():
        if size + tensor.nbytes > FILE_LIMIT and parts[-1]:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    return parts


def save(model: Target, out: Path, tokenizer: Path | None = None, quantised: bool = True) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("model*.safetensors*"):
        old.unlink()
    weights, table = tensors(model, quantised)
    parts = shards(weights)
    index: dict[str, str] = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        # MLX stores the packed words as uint32; the bits are the same
        words = {k: v.view(torch.uint32) if v.dtype == torch.int32 else v for k, v in part.items()}
        save_file(words, out / file, metadata={"format": "mlx"})
        index |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in weights.values())
    manifest = {
        "metadata": {
            "total_size": total,
            "total_parameters": sum(p.numel() for p in model.parameters()),
        },
        "weight_map": dict(sorted(index.items())),
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(manifest, indent=1) + "\n")
    config = model.cfg.hf_config()
    if table:
        config |= {"quantization": table, "quantization_config": table}
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    if tokenizer and tokenizer != out:
        for name in TOKENIZER_FILES:
            shutil.copy(tokenizer / name, out / name)


def load(folder: Path, dtype: torch.dtype, device: str) -> Target:
    """A frozen model with the dequantised weights of a folder written by ``save``."""
    text = json.loads((folder / "config.json").read_text())["text_config"]
    cfg = TargetConfig(layers=text["num_hidden_layers"])
    if text != cfg.text_config():
        raise ValueError(f"{folder}/config.json is not a demo target")
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        with safe_open(file, "pt") as handle:
            names = list(handle.keys())
            stored |= {k.removeprefix(PREFIX): handle.get_tensor(k) for k in names}
    model = Target(cfg, dtype)
    bits = {name: m.bits for name, m in model.named_modules() if isinstance(m, Weight)}
    state: dict[str, Tensor] = {}
    for name in model.state_dict():
        path = name.removesuffix(".weight")
        if f"{path}.scales" in stored:
            words = stored[name].view(torch.int32)
            pair = stored[f"{path}.scales"], stored[f"{path}.biases"]
            state[name] = quantise.unpack(words, *pair, bits[path])
        else:
            state[name] = stored[name].float()
    model.load_state_dict(state)
    return model.requires_grad_(False).eval().to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a randomly initialised pair.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    save(Target(TargetConfig()), args.out / "target", args.tokenizer)
    save_draft(Draft(DraftConfig()), args.out / "draft")


if __name__ == "__main__":
    main()
