"""Train the target: next-token loss, Muon, and rounding to 4 bits in the last part.

From ``--round-from`` of the run on, every step computes loss and gradient with the quantised
weights and applies the update to the full-precision ones (a straight-through estimate), so that
the exported 4-bit model is the one that was trained. Writes ``OUT/state.pt`` (resumable), then the
quantised checkpoint to ``OUT/target`` and ``OUT/train.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import config
import data
import export
import quantise
from model import Target, Weight
from optim import Optimiser, trapezoid

BALANCE = 0.005  # weight of the load-balance loss


class Rounder:
    """Swaps quantised weights in for the duration of a ``with`` block."""

    def __init__(self, model: Target, compiled: bool) -> None:
        self.weights = [m for m in model.modules() if isinstance(m, Weight) and m.bits]
        self.round = torch.compile(quantise.rounded) if compiled else quantise.rounded

    @contextmanager
    def on(self, active: bool = True) -> Iterator[None]:
        if not active:
            yield
            return
        kept = [m.weight.data for m in self.weights]
        for m in self.weights:
            m.weight.data = self.round(m.weight.data, m.bits)
        try:
            yield
        finally:
            for m, weight in zip(self.weights, kept, strict=True):
                m.weight.data = weight


def token_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden.to(head.dtype), head).float()
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


class Trainer:
    def __init__(self, args: argparse.Namespace, device: str) -> None:
        cuda = device == "cuda"
        self.args, self.device = args, device
        cfg = config.tiny()[0] if args.tiny else config.TargetConfig()
        torch.manual_seed(args.seed)
        self.model = Target(cfg, torch.bfloat16 if cuda else torch.float32).to(device)
        self.optimiser = Optimiser(self.model, args.muon_lr, args.adam_lr, args.decay)
        self.rounder = Rounder(self.model, cuda)
        self.loss = torch.compile(token_loss) if cuda else token_loss
        if cuda:
            torch.set_float32_matmul_precision("high")
            for layer in self.model.model.layers:
                layer.compile()
        self.sizes = json.loads((args.tokens / "bytes.json").read_text())
        self.done = 0

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, _, loads, balance = self.model(batch[:, :-1])
        return self.loss(hidden, self.model.lm_head(self.model.dtype), batch[:, 1:]), loads, balance

    def held_out(self, rounded: bool) -> dict[str, float]:
        """Loss in nats a token and bits a byte on both held-out sets."""
        report: dict[str, float] = {}
        with self.rounder.on(rounded):
            for name in ("heldout_files", "heldout_packages"):
                tokens = data.read(self.args.tokens / f"{name}.bin", self.device)
                size = self.sizes[name]
                # with gradient bookkeeping: the same compiled graph as in training
                losses = [self.forward(b)[0].detach()
                          for b in data.in_order(tokens, self.args.micro, self.args.length)]
                nats = float(torch.stack(losses).mean())
                report[name] = nats
                report[name + "_bpb"] = nats * size["tokens"] / size["bytes"] / math.log(2)
        return report

    def run(self) -> dict[str, object]:
        args = self.args
        tokens = data.read(args.tokens / "train.bin", self.device)
        batches = data.epochs(tokens, args.micro, args.length, args.seed + self.done)
        parts, began, mark = args.batch // args.micro, time.time(), time.time()
        report: dict[str, object] = {}
        for step in range(self.done, args.steps):
            progress = step / args.steps
            total = torch.zeros((), device=self.device)
            with self.rounder.on(progress >= args.round_from):
                for _ in range(parts):
                    loss, loads, balance = self.forward(next(batches))
                    ((loss + BALANCE * balance) / parts).backward()
                    total += loss.detach() / parts
            self.optimiser.step(trapezoid(progress, cool=args.cool))
            if step % args.log == 0 or step + 1 == args.steps:
                seconds, mark = time.time() - mark, time.time()
                speed = args.log * args.batch * args.length / seconds
                spread = loads.amax(1).max() * self.model.cfg.experts
                print(f"step {step} loss {float(total):.4f} {speed:,.0f} tok/s "
                      f"busiest expert x{float(spread):.2f} idlest x"
                      f"{float(loads.min()) * self.model.cfg.experts:.3f}", flush=True)
            if args.save and (step + 1) % args.save == 0:
                self.done = step + 1
                self.save()
            if step + 1 in (args.steps // 2, int(args.steps * args.round_from)):
                report[f"step_{step + 1}"] = {
                    "plain": self.held_out(False), "rounded": self.held_out(True)}
                print(json.dumps(report[f"step_{step + 1}"]), flush=True)
        report["final"] = {"plain": self.held_out(False), "rounded": self.held_out(True)}
        report |= {
            "steps": args.steps,
            "tokens_seen": args.steps * args.batch * args.length,
            "train_tokens": len(tokens),
            "length": args.length,
            "seconds": round(time.time() - began, 1),
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "torch": torch.__version__,
            "arguments": {k: str(v) for k, v in vars(args).items()},
        }
        return report

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict(),
                 "done": self.done}
        torch.save(state, self.args.out / "state.tmp")
        (self.args.out / "state.tmp").rename(self.args.out / "state.pt")

    def resume(self) -> None:
        state = torch.load(self.args.out / "state.pt", map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.done = state["done"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenise.py")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64, help="rows a step")
    parser.add_argument("--micro", type=int, default=32, help="rows a forward pass")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--decay", type=float, default=0.02)
    parser.add_argument("--cool", type=float, default=0.4)
    parser.add_argument("--round-from", type=float, default=0.7)
    parser.add_argument("--save", type=int, default=1000, help="steps between saved states")
    parser.add_argument("--log", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="four layers, for a dry run")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(args, "cuda" if torch.cuda.is_available() else "cpu")
    if (args.out / "state.pt").exists():
        trainer.resume()
    report = trainer.run()
    export.save(trainer.model, args.out / "target", args.tokenizer)
    (args.out / "train.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["final"]))


if __name__ == "__main__":
    main()
