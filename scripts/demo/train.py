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

BALANCE = 0.01  # weight of the load-balance loss


class Rounder:
    """Writes quantised values into the weights for the duration of a ``with`` block."""

    def __init__(self, model: Target, compiled: bool) -> None:
        self.weights = [m for m in model.modules() if isinstance(m, Weight) and m.bits]
        self.round = torch.compile(quantise.rounded) if compiled else quantise.rounded

    @contextmanager
    def on(self, active: bool = True) -> Iterator[None]:
        kept = [m.weight.data.clone() for m in self.weights] if active else []
        for m, weight in zip(self.weights, kept, strict=False):
            m.weight.data.copy_(self.round(weight, m.bits))
        try:
            yield
        finally:
            for m, weight in zip(self.weights, kept, strict=False):
                m.weight.data.copy_(weight)


def token_loss(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden.to(head.dtype), head).float()
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


class Pass:
    """One forward and backward pass; on a GPU it is captured once as a CUDA graph and replayed.

    Gradients accumulate in place, so they are zeroed, never freed.
    """

    def __init__(self, model: Target, batch: int, length: int, parts: int, cuda: bool) -> None:
        self.model, self.parts = model, parts
        self.cross = torch.compile(token_loss) if cuda else token_loss
        device = model.lm_head.weight.device
        self.batch = torch.randint(4, 1000, (batch, length + 1), device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if cuda:
            for layer in model.model.layers:
                layer.compile()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self.compute()
            torch.cuda.current_stream().wait_stream(side)
            self.zero()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.compute()

    def compute(self) -> None:
        hidden, _, self.loads, balance = self.model(self.batch[:, :-1])
        loss = self.cross(hidden, self.model.lm_head(self.model.dtype), self.batch[:, 1:])
        ((loss + BALANCE * balance) / self.parts).backward()
        self.loss = loss.detach()

    def zero(self) -> None:
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.zero_()

    def run(self, batch: Tensor) -> Tensor:
        """Adds the gradient of a batch [B, T + 1] and returns its loss."""
        self.batch.copy_(batch)
        if self.graph is None:
            self.compute()
        else:
            self.graph.replay()
        return self.loss


class Trainer:
    def __init__(self, args: argparse.Namespace, device: str) -> None:
        cuda = device == "cuda"
        self.args, self.device = args, device
        cfg = config.tiny()[0] if args.tiny else config.TargetConfig()
        torch.manual_seed(args.seed)
        self.model = Target(cfg, torch.bfloat16 if cuda else torch.float32).to(device)
        self.optimiser = Optimiser(self.model, args.muon_lr, args.adam_lr, args.decay)
        self.rounder = Rounder(self.model, cuda)
        if cuda:
            torch.set_float32_matmul_precision("high")
        self.steps = Pass(self.model, args.micro, args.length, args.batch // args.micro, cuda)
        self.sizes = json.loads((args.tokens / "bytes.json").read_text())
        self.done, self.spent = 0, 0.0  # steps, seconds

    def held_out(self, rounded: bool) -> dict[str, float]:
        """Loss in nats a token and bits a byte on both held-out sets."""
        report: dict[str, float] = {}
        with self.rounder.on(rounded):
            for name in ("heldout_files", "heldout_packages"):
                tokens = data.read(self.args.tokens / f"{name}.bin", self.device)
                size = self.sizes[name]
                losses = [
                    self.steps.run(batch).clone()  # its gradient is dropped below
                    for batch in data.in_order(tokens, self.args.micro, self.args.length)
                ]
                nats = float(torch.stack(losses).mean())
                report[name] = nats
                report[name + "_bpb"] = nats * size["tokens"] / size["bytes"] / math.log(2)
        self.steps.zero()
        return report

    def run(self) -> dict[str, object]:
        args = self.args
        tokens = data.read(args.tokens / "train.bin", self.device)
        batches = data.epochs(tokens, args.micro, args.length, args.seed + self.done)
        parts, began, mark = args.batch // args.micro, time.time() - self.spent, time.time()
        report: dict[str, object] = {}
        step, progress, rounding = self.done, 0.0, False
        while progress < 1.0:
            if args.minutes:
                progress = (time.time() - began) / 60 / args.minutes
            else:
                progress = step / args.steps
            if progress >= args.round_from and not rounding:
                rounding = True
                report["before_rounding"] = {
                    "step": step,
                    "plain": self.held_out(False),
                    "rounded": self.held_out(True),
                }
                print(json.dumps(report["before_rounding"]), flush=True)
            total = torch.zeros((), device=self.device)
            with self.rounder.on(rounding):
                for _ in range(parts):
                    total += self.steps.run(next(batches)) / parts
            self.optimiser.step(trapezoid(min(progress, 1.0), cool=args.cool))
            self.steps.zero()
            if step % args.log == 0:
                value, seconds, mark = float(total), time.time() - mark, time.time()
                speed = args.log * args.batch * args.length / seconds
                loads = self.steps.loads * self.model.cfg.experts
                print(
                    f"step {step} {progress:.1%} loss {value:.4f} {speed:,.0f} tok/s "
                    f"expert load {float(loads.min()):.3f} to {float(loads.max()):.2f}, "
                    f"worst layer uses {int((loads > 0.05).sum(1).min())}",
                    flush=True,
                )
            step += 1
            if args.save and step % args.save == 0:
                self.done, self.spent = step, time.time() - began
                self.save()
        report["final"] = {"plain": self.held_out(False), "rounded": self.held_out(True)}
        report |= {
            "steps": step,
            "tokens_seen": step * args.batch * args.length,
            "train_tokens": len(tokens),
            "length": args.length,
            "seconds": round(time.time() - began, 1),
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "torch": torch.__version__,
            "arguments": {k: str(v) for k, v in vars(args).items()},
        }
        return report

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "done": self.done,
            "spent": self.spent,
        }
        torch.save(state, self.args.out / "state.tmp")
        (self.args.out / "state.tmp").rename(self.args.out / "state.pt")

    def resume(self) -> None:
        state = torch.load(self.args.out / "state.pt", map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.done, self.spent = state["done"], state["spent"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenise.py")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=0.0, help="instead of --steps")
    parser.add_argument("--batch", type=int, default=64, help="rows a step")
    parser.add_argument("--micro", type=int, default=32, help="rows a forward pass")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.003)
    parser.add_argument("--decay", type=float, default=0.02)
    parser.add_argument("--cool", type=float, default=0.4)
    parser.add_argument("--round-from", type=float, default=0.7)
    parser.add_argument("--save", type=int, default=1000, help="steps between saved states")
    parser.add_argument("--log", type=int, default=20)
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
