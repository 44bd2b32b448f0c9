"""Train the DFlash draft on the target's own text.

Per row, random anchors a inside the response; each gives a block [token_a, MASK x 7] at positions
a .. a+7 that sees the context rows before a, and slot k is to predict token a+k. Loss: weighted
cross-entropy plus a share of the divergence from the target's distribution, weights
exp(-(k-1)/4). Taps and teacher rows come from the frozen quantised target in the same pass.
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
from optim import Optimiser, trapezoid

GAMMA = 4.0


class Rows:
    """Regenerated rows of one length, on the device, in endless shuffled batches."""

    def __init__(self, path: Path, batch: int, device: str, seed: int) -> None:
        stored = np.load(path)
        self.tokens = torch.from_numpy(stored["tokens"].astype(np.int32)).to(device)
        self.size = torch.from_numpy(stored["size"]).long().to(device)
        self.end = torch.from_numpy(stored["end"]).long().to(device)
        usable = (self.end - self.size >= 4).nonzero().squeeze(1).cpu()
        self.usable, self.batch = usable, min(batch, len(usable))
        self.generator = torch.Generator().manual_seed(seed)
        self.order = usable[:0]

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        if len(self.order) < self.batch:
            mixed = torch.randperm(len(self.usable), generator=self.generator)
            self.order = self.usable[mixed]
        pick, self.order = self.order[: self.batch], self.order[self.batch :]
        pick = pick.to(self.tokens.device)
        return self.tokens[pick].long(), self.size[pick], self.end[pick]


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
                layer.compile()
            self.loss = torch.compile(block_loss)
            self.forward = torch.compile(self.draft.forward)
        slots = torch.arange(self.cfg.block - 1, device=device)
        self.decay = torch.exp(-slots / GAMMA)

    def batch_loss(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Loss and hit rate per slot [block - 1] on one batch."""
        tokens, size, end = rows.next()
        anchors = pick_anchors(size, end, self.args.anchors)  # [B, A]
        with torch.no_grad():
            hidden, taps, _, _ = self.target(tokens, self.cfg.taps)
            bonus = self.target.embed(tokens.gather(1, anchors))
            mask_row = self.target.model.embed_tokens.weight[self.cfg.mask_id]
            steps = torch.arange(1, self.cfg.block, device=self.device)
            where = anchors.unsqueeze(-1) + steps  # [B, A, block - 1], label positions
            inside = where.clamp_max(tokens.shape[1] - 1).flatten(1)
            labels = tokens.gather(1, inside).flatten()
            teacher = hidden.gather(1, (inside - 1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
            valid = (where < end[:, None, None]).float()
            weight = (valid * self.decay).flatten()
        out = self.forward(torch.cat(taps, -1), bonus, mask_row, anchors)[:, :, 1:]
        head = self.target.lm_head(self.target.dtype)
        loss, hits = self.loss(
            out.flatten(0, 2), teacher.flatten(0, 1), head, labels, weight, self.args.share)
        rate = (hits.view_as(valid) * valid).sum((0, 1)) / valid.sum((0, 1)).clamp_min(1)
        return loss, rate

    def run(self) -> dict[str, object]:
        args = self.args
        sources = [Rows(path, args.batch * args.unit // length, self.device, args.seed + i)
                   for i, (path, length) in enumerate(args.rows)]
        for rows in sources:  # compile outside the timed part
            self.batch_loss(rows)[0].backward()
        self.draft.zero_grad()
        began = time.time()
        rates: list[list[float]] = []
        step, progress = 0, 0.0
        while progress < 1.0:
            rows = sources[1] if len(sources) > 1 and step % args.long_every == 0 else sources[0]
            loss, rate = self.batch_loss(rows)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.draft.parameters(), 1.0)
            self.optimiser.step(trapezoid(min(progress, 1.0), cool=args.cool))
            self.draft.zero_grad()
            step += 1
            if args.minutes:
                progress = (time.time() - began) / 60 / args.minutes
            else:
                progress = step / args.steps
            if step % args.log == 1 or progress >= 1.0:
                rates.append([round(r, 3) for r in rate.tolist()])
                print(f"step {step} {progress:.0%} loss {loss.item():.4f} hits {rates[-1]}",
                      flush=True)
        return {"steps": step, "seconds": round(time.time() - began, 1), "last_hits": rates[-1],
                "blocks": step * args.batch * args.anchors,
                "arguments": {k: str(v) for k, v in vars(args).items()}}


def rows_argument(text: str) -> tuple[Path, int]:
    path, _, length = text.rpartition(":")
    return Path(path), int(length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=Path, required=True, help="quantised checkpoint")
    parser.add_argument("--rows", type=rows_argument, nargs="+", required=True,
                        help="FILE.npz:LENGTH of regenerate.py; a second one is the long kind")
    parser.add_argument("--out", type=Path, required=True, help="folder of the draft")
    parser.add_argument("--start", type=Path, help="draft to go on from")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=0.0, help="instead of --steps")
    parser.add_argument("--batch", type=int, default=96, help="rows of --unit tokens a step")
    parser.add_argument("--unit", type=int, default=448)
    parser.add_argument("--long-every", type=int, default=5)
    parser.add_argument("--anchors", type=int, default=48)
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
