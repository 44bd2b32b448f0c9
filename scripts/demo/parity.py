"""Check an exported target against mlx-lm: names, gates, norms, interleaving and packing.

``--tiny`` builds a random four-layer model, exports it in float32 and in 4 bits and compares both
with PyTorch; ``--model DIR`` compares a finished export. Refused (exit status 1): a largest logit
difference of 1e-3 or more, an argmax that differs, or a dequantised tensor that is not equal bit
for bit.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model

import config
import export
import quantise
from model import Target, Weight


def logits_difference(model: Target, folder: Path, length: int = 128) -> tuple[float, bool]:
    """Largest logit difference to mlx-lm in float32, and whether every argmax agrees."""
    ids = np.random.default_rng(0).integers(4, model.cfg.vocab, (2, length))
    with torch.no_grad():
        ours = model.logits(model(torch.from_numpy(ids))[0]).numpy()
    theirs_model, _ = load_model(folder)
    theirs_model.set_dtype(mx.float32)
    theirs = np.array(theirs_model(mx.array(ids)))
    agree = bool((ours.argmax(-1) == theirs.argmax(-1)).all())
    return float(np.abs(ours - theirs).max()), agree


def step_difference(model: Target, length: int = 64) -> float:
    """Largest logit difference between whole-sequence and token-by-token evaluation."""
    ids = torch.randint(4, model.cfg.vocab, (2, length))
    with torch.no_grad():
        whole = model.logits(model(ids)[0])
        states = model.states(2, length)
        rows = [model.step(ids[:, t], states, torch.full((2,), t)) for t in range(length)]
    return float((torch.stack(rows, 1) - whole).abs().max())


def packing_is_exact(model: Target) -> bool:
    """Does MLX dequantise our packed words to the very numbers we compute with?"""
    for module in model.modules():
        if not isinstance(module, Weight) or not module.bits:
            continue
        packed = quantise.pack(module.weight, module.bits)
        words = mx.array(packed["weight"].numpy().view(np.uint32))
        scales, biases = (mx.array(packed[k].float().numpy()) for k in ("scales", "biases"))
        theirs = mx.dequantize(words, scales, biases, group_size=64, bits=module.bits)
        ours = quantise.unpack(packed["weight"], packed["scales"], packed["biases"], module.bits)
        if not np.array_equal(np.array(theirs), ours.numpy()):
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--tiny", action="store_true")
    choice.add_argument("--model", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    good = True
    if args.model:
        model = export.load(args.model, torch.float32, "cpu")
        cases = [("4 bits", model, args.model)]
    else:
        model = Target(config.tiny()[0]).requires_grad_(False)
        for name, p in model.named_parameters():  # ones and zeros would hide mistakes
            if name.endswith("norm.weight"):
                p.mul_(1 + 0.2 * torch.randn_like(p))
        folder = Path(tempfile.mkdtemp())
        export.save(model, folder / "dense", quantised=False)
        export.save(model, folder / "q4")
        packed = export.load(folder / "q4", torch.float32, "cpu")
        cases = [("float32", model, folder / "dense"), ("4 bits", packed, folder / "q4")]
    for label, net, where in cases:
        worst, agree = logits_difference(net, where)
        print(f"{label}: largest logit difference {worst:.2e}, argmax equal: {agree}")
        good &= agree and worst < 1e-3
    recurrent = step_difference(model)
    exact = packing_is_exact(model)
    print(f"whole sequence against single steps: {recurrent:.2e}; packing exact: {exact}")
    raise SystemExit(not (good and exact and recurrent < 1e-3))


if __name__ == "__main__":
    main()
