"""Train the DFlash draft on the target's own text.

Per row, random anchors a inside the response; each gives a block [token_a, MASK x 7] at positions
a .. a+7 that sees the context rows before a, and slot k is to predict token a+k. Loss: weighted
cross-entropy plus a share of the divergence from the target's distribution, weights
exp(-(k-1)/4). Taps and teacher rows of the frozen quantised target are computed once and kept on
the device; what does not fit at once is divided into ``--pools``, one after the other. A row is
drawn as often as it has tokens to learn from.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import config
import export
from draft import Draft, load_draft, save_draft
from model import Target
from optim import Optimiser, trapezoid

GAMMA = 4.0


class Rows:
    """Regenerated rows of one length and, for one pool of them, what the target makes of them."""

    def __init__(self, path: Path, batch: int, pools: int, device: str, seed: int) -> None:
        stored = np.load(path)
        usable = np.nonzero(stored["end"] - stored["size"] >= 4)[0]
        np.random.default_rng(seed).shuffle(usable)
        self.stored = [
            torch.from_numpy(stored[name][usable].astype(np.int32)).to(device)
            for name in ("tokens", "size", "end")
        ]
        self.pools = torch.arange(len(usable), device=device).chunk(pools)
        self.batch = batch

    @torch.no_grad()
    def fill(self, pool: int, target: Target, layers: tuple[int, ...]) -> None:
        """Run the target over a pool; only positions before a row's end are kept."""
        self.taps = self.hidden = torch.empty(0)  # first make room
        rows = self.pools[pool % len(self.pools)]
        self.tokens, self.size, self.end = (x[rows].long() for x in self.stored)
        self.start = self.end.cumsum(0) - self.end
        steps = torch.arange(self.tokens.shape[1], device=rows.device)
        total, width = int(self.end.sum()), target.cfg.hidden
        self.taps = torch.empty(total, len(layers) * width, dtype=target.dtype, device=rows.device)
        self.hidden = torch.empty(total, width, dtype=target.dtype, device=rows.device)
        for first in range(0, len(rows), self.batch):
            pick = torch.arange(first, first + self.batch, device=rows.device)
            pick = pick.clamp_max(len(rows) - 1)  # a full batch: one shape to compile
            hidden, seen, _, _ = target(self.tokens[pick], layers)
            inside = steps < self.end[pick].unsqueeze(1)
            where = (self.start[pick].unsqueeze(1) + steps)[inside]
            self.taps[where] = torch.cat([x.to(target.dtype) for x in seen], -1)[inside]
            self.hidden[where] = hidden.to(target.dtype)[inside]

    def next(self) -> tuple[Tensor, ...]:
        """tokens [B, T], size [B], end [B], taps [B, T, n * H], hidden [B, T, H]; after a row's
        end the last two belong to other rows."""
        pick = torch.multinomial((self.end - self.size).float(), self.batch, replacement=True)
        tokens = self.tokens[pick]
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        where = (self.start[pick].unsqueeze(1) + steps).clamp_max(len(self.taps) - 1)
        return tokens, self.size[pick], self.end[pick], self.taps[where], self.hidden[where]


def pick_anchors(size: Tensor, end: Tensor, count: int) -> Tensor:
    """[B, A] positions a with size <= a and a + 1 < end."""
    room = (end - 1 - size).clamp_min(1).unsqueeze(1)
    offset = (torch.rand(len(size), count, device=size.device) * room).long()
    return size.unsqueeze(1) + torch.minimum(offset, room - 1)


def block_loss(
    hidden: Tensor, teacher: Tensor, head: Tensor, labels: Tensor, weight: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """hidden, teacher [N, H]; labels, weight [N] -> loss and hits [N] (top-1 equals the label)."""
    logits = F.linear(hidden.to(head.dtype), head).float()
    aim = F.linear(teacher.to(head.dtype), head).float()
    log_q = logits.log_softmax(-1)
    hard = -log_q.gather(1, labels.unsqueeze(1)).squeeze(1)
    log_p = aim.log_softmax(-1)
    soft = (log_p.exp() * (log_p - log_q)).sum(-1)
    loss = ((hard + share * soft) * weight).sum() / weight.sum().clamp_min(1e-6)
    return loss, logits.argmax(-1) == labels


class Distiller:
    def __init__(self, args: argparse.Namespace, device: str) -> None:
        cuda = device == "cuda"
        self.args, self.device = args, device
        self.target = export.load(args.target, torch.bfloat16 if cuda else torch.float32, device)
        cfg = config.tiny()[1] if self.target.cfg.layers == 4 else config.DraftConfig()
        torch.manual_seed(args.seed)
        if args.start:
            self.draft = load_draft(args.start, self.target.dtype, device)
        else:
            self.draft = Draft(cfg, self.target.dtype).to(device)
        self.cfg = self.draft.cfg
        self.optimiser = Optimiser(self.draft, args.muon_lr, args.adam_lr, args.decay)
        self.loss, self.forward = block_loss, self.draft.forward
        if cuda:
            torch.set_float32_matmul_precision("high")
            for layer in self.target.model.layers:
                layer.compile(dynamic=False)
            self.loss = torch.compile(block_loss, dynamic=False)
            self.forward = torch.compile(self.draft.forward, dynamic=False)
        slots = torch.arange(self.cfg.block - 1, device=device)
        self.decay = torch.exp(-slots / GAMMA)

    def batch_loss(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Loss and hit rate per slot [block - 1] on one batch."""
        tokens, size, end, taps, hidden = rows.next()
        anchors = pick_anchors(size, end, self.args.anchors)  # [B, A]
        with torch.no_grad():
            bonus = self.target.embed(tokens.gather(1, anchors))
            mask_row = self.target.model.embed_tokens.weight[self.cfg.mask_id]
            steps = torch.arange(1, self.cfg.block, device=self.device)
            where = anchors.unsqueeze(-1) + steps  # [B, A, block - 1], label positions
            inside = where.clamp_max(tokens.shape[1] - 1).flatten(1)
            labels = tokens.gather(1, inside).flatten()
            teacher = hidden.gather(1, (inside - 1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
            valid = (where < end[:, None, None]).float()
            weight = (valid * self.decay).flatten()
        out = self.forward(taps, bonus, mask_row, anchors)[:, :, 1:]
        head = self.target.lm_head(self.target.dtype)
        loss, hits = self.loss(
            out.flatten(0, 2), teacher.flatten(0, 1), head, labels, weight, self.args.share
        )
        rate = (hits.view_as(valid) * valid).sum((0, 1)) / valid.sum((0, 1)).clamp_min(1)
        return loss, rate

    def run(self) -> dict[str, object]:
        args = self.args
        sources = [
            Rows(path, args.batch * args.unit // length, args.pools, self.device, i)
            for i, (path, length) in enumerate(args.rows)
        ]
        for rows in sources:
            rows.fill(0, self.target, self.cfg.taps)
            self.batch_loss(rows)[0].backward()  # compile outside the timed part
        self.draft.zero_grad()
        print(f"ready: {sum(len(rows.taps) for rows in sources):,} tokens kept", flush=True)
        began, saved, pool = time.time(), time.time(), 0
        rates: list[list[float]] = []
        step, blocks, progress = 0, 0, 0.0
        while progress < 1.0:
            if int(progress * args.pools) > pool:
                pool += 1
                for rows in sources:
                    rows.fill(pool, self.target, self.cfg.taps)
            rows = sources[1] if len(sources) > 1 and step % args.long_every == 0 else sources[0]
            loss, rate = self.batch_loss(rows)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.draft.parameters(), 1.0)
            self.optimiser.step(trapezoid(min(progress, 1.0), cool=args.cool))
            self.draft.zero_grad()
            step += 1
            blocks += rows.batch * args.anchors
            if args.minutes:
                progress = (time.time() - began) / 60 / args.minutes
            else:
                progress = step / args.steps
            if step % args.log == 1 or progress >= 1.0:
                rates.append([round(r, 3) for r in rate.tolist()])
                print(
                    f"step {step} {progress:.0%} loss {loss.item():.4f} hits {rates[-1]}",
                    flush=True,
                )
            if time.time() - saved > 120:
                save_draft(self.draft, args.out)
                saved = time.time()
        return {
            "steps": step,
            "seconds": round(time.time() - began, 1),
            "last_hits": rates[-1],
            "blocks": step * args.batch * args.anchors,
            "arguments": {k: str(v) for k, v in vars(args).items()},
        }


def rows_argument(text: str) -> tuple[Path, int]:
    path, _, length = text.rpartition(":")
    return Path(path), int(length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=Path, required=True, help="quantised checkpoint")
    parser.add_argument(
        "--rows",
        type=rows_argument,
        nargs="+",
        required=True,
        help="FILE.npz:LENGTH of regenerate.py; a second one is the long kind",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the draft")
    parser.add_argument("--start", type=Path, help="draft to go on from")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=0.0, help="instead of --steps")
    parser.add_argument("--batch", type=int, default=96, help="rows of --unit tokens a step")
    parser.add_argument("--unit", type=int, default=448)
    parser.add_argument("--long-every", type=int, default=5)
    parser.add_argument("--anchors", type=int, default=48)
    parser.add_argument("--pools", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.5, help="weight of the divergence")
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--adam-lr", type=float, default=0.002)
    parser.add_argument("--decay", type=float, default=0.02)
    parser.add_argument("--cool", type=float, default=0.5)
    parser.add_argument("--log", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    distiller = Distiller(args, "cuda" if torch.cuda.is_available() else "cpu")
    report = distiller.run()
    save_draft(distiller.draft, args.out)
    (args.out.parent / "distil.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
