"""Train the DFlash draft on the target's own text.

Per row, random anchors a inside the response; each gives a block [token_a, MASK x 7] at positions
a .. a+7 that sees the context rows before a, and slot k is to predict token a+k. Loss: weighted
cross-entropy plus a share of the divergence from the target's distribution, weights
exp(-(k-1)/4), of which ``--reach`` is multiplied by the draft's own probability that a chain gets
as far as slot k. Taps and teacher rows of the frozen quantised target are computed once and kept on
the device; what exceeds ``--room`` is divided into pools, one after the other. A row is drawn as
often as it has tokens to learn from. ``--held`` rows, from prompts that no training saw, are
measured up to where they begin to repeat themselves. Under ``torchrun`` every GPU takes its share
of the rows.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import config
import export
from accept import accepted, best_first
from draft import Draft, load_draft, save_draft
from optim import Optimiser, trapezoid
from rows import Rows, pick_anchors
from team import Team

GAMMA = 4.0
PACE = 16  # steps between two looks at the clock
STARTED = time.time()


def block_loss(
    hidden: Tensor,
    teacher: Tensor,
    head: Tensor,
    labels: Tensor,
    weight: Tensor,
    share: float,
    reach: float,
) -> tuple[Tensor, Tensor]:
    """hidden, teacher [N, S, H]; labels, weight [N, S] -> loss and hits [N, S] (top-1 = label)."""
    logits = F.linear(hidden.to(head.dtype), head).float()
    aim = F.linear(teacher.to(head.dtype), head).float()
    log_q = logits.log_softmax(-1)
    hard = -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    log_p = aim.log_softmax(-1)
    soft = (log_p.exp() * (log_p - log_q)).sum(-1)
    before = (hard - hard.cumsum(-1)).detach().exp()  # probability that a chain reaches the slot
    weight = weight * (1 - reach + reach * before)
    loss = ((hard + share * soft) * weight).sum() / weight.sum().clamp_min(1e-6)
    return loss, logits.argmax(-1) == labels


class Distiller:
    def __init__(self, args: argparse.Namespace) -> None:
        self.team = Team()
        device = self.team.device
        cuda = device.startswith("cuda")
        self.args, self.device = args, device
        self.target = export.load(args.target, torch.bfloat16 if cuda else torch.float32, device)
        cfg = config.tiny()[1] if self.target.cfg.layers == 4 else config.DraftConfig()
        torch.manual_seed(args.seed)
        if args.start:
            self.draft = load_draft(args.start, self.target.dtype, device, args.layers)
        else:
            self.draft = Draft(cfg, self.target.dtype).to(device)
        self.cfg = self.draft.cfg
        torch.manual_seed(args.seed + 1 + self.team.rank)
        self.optimiser = Optimiser(self.draft, args.muon_lr, args.adam_lr, args.decay)
        self.loss, self.forward = block_loss, self.draft.forward
        if cuda:
            torch.set_float32_matmul_precision("high")
            torch._dynamo.config.recompile_limit = 64  # lengths times kinds of layers
            for layer in self.target.model.layers:
                layer.compile(dynamic=False)
            self.loss = torch.compile(block_loss, dynamic=False)
            self.forward = torch.compile(self.draft.forward, dynamic=False)
        slots = torch.arange(self.cfg.block - 1, device=device)
        self.decay = torch.exp(-slots / GAMMA)

    def blocks(self, tokens: Tensor, taps: Tensor, anchors: Tensor) -> Tensor:
        """Hidden rows [B, A, block - 1, H] of the blocks at ``anchors`` [B, A]."""
        bonus = self.target.embed(tokens.gather(1, anchors))
        mask_row = self.target.model.embed_tokens.weight[self.cfg.mask_id]
        return self.forward(taps, bonus, mask_row, anchors)[:, :, 1:]

    def labels(self, tokens: Tensor, anchors: Tensor, end: Tensor) -> tuple[Tensor, ...]:
        """Positions, tokens and which are to be learnt, [B, A, block - 1] each."""
        where = anchors.unsqueeze(-1) + torch.arange(1, self.cfg.block, device=self.device)
        inside = where.clamp_max(tokens.shape[1] - 1)
        labels = tokens.gather(1, inside.flatten(1)).view_as(where)
        return inside, labels, where < end[:, None, None]

    def batch_loss(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Loss and hit rate per slot [block - 1] on one batch."""
        tokens, size, end, taps, hidden = rows.next()
        anchors = pick_anchors(size, end, self.args.anchors)  # [B, A]
        inside, labels, valid = self.labels(tokens, anchors, end)
        before = (inside - 1).flatten(1).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        teacher = hidden.gather(1, before).view(*inside.shape, -1)
        out = self.blocks(tokens, taps, anchors)
        loss, hits = self.loss(
            out.flatten(0, 1),
            teacher.flatten(0, 1),
            self.target.lm_head(self.target.dtype),
            labels.flatten(0, 1),
            (valid * self.decay).flatten(0, 1),
            self.args.share,
            self.args.reach,
        )
        rate = (hits.view_as(valid) & valid).sum((0, 1)) / valid.sum((0, 1)).clamp_min(1)
        return loss, rate

    def measure(self, held: Rows) -> dict[str, object]:
        """Hits per slot and tokens a round at random anchors of held-out rows, always the same:
        for the chain and for best-first trees of 6 in the first four slots; blocks end where a
        row begins to repeat."""
        state = torch.get_rng_state()
        torch.manual_seed(0)
        hits, valid, depths = [], [], []
        for first in range(0, min(len(held.size), 4 * held.batch), held.batch):
            pick = torch.arange(first, first + held.batch) % len(held.size)
            tokens, size, end, taps, _ = held.take(pick.to(self.device))
            share = torch.rand(held.batch, self.args.anchors).to(self.device)
            anchors = size.unsqueeze(1) + (share * (end - 1 - size).unsqueeze(1)).long()
            _, labels, inside = self.labels(tokens, anchors, end)
            out = self.blocks(tokens, taps, anchors).detach()
            top = self.target.logits(out[:, :4]).float().log_softmax(-1).topk(6, -1)
            hits.append((self.target.logits(out).argmax(-1) == labels) & inside)
            valid.append(inside)
            short = zip(
                *(x.flatten(0, 1).tolist() for x in (*top, labels[:, :4], inside[:, :4])),
                strict=True,
            )
            depths += [
                accepted(best_first(logp, ids, 6), truth[: sum(real)])
                for logp, ids, truth, real in short
            ]
        torch.set_rng_state(state)
        hit, real = torch.cat(hits), torch.cat(valid)
        rate = hit.sum((0, 1)) / real.sum((0, 1)).clamp_min(1)
        chain = 1 + hit.long().cumprod(-1).sum(-1).float().mean()
        return {
            "hits": [round(x, 3) for x in rate.tolist()],
            "chain": round(chain.item(), 3),
            "budget_6": round(1 + sum(depths) / len(depths), 3),
        }

    def run(self) -> dict[str, object]:
        args, team = self.args, self.team
        sources = [
            Rows(path, args.batch * args.unit // length, self.device, part=(team.rank, team.size))
            for path, length in args.rows
        ]
        bytes_each = (len(self.cfg.taps) + 1) * self.target.cfg.hidden * self.target.dtype.itemsize
        pools = math.ceil(sum(rows.total for rows in sources) * bytes_each / (args.room * 1e9))
        held = None
        if args.held and team.first:
            held = Rows(args.held, sources[0].batch, self.device, "first")
        tokens = sum(rows.total for rows in sources)
        print(f"GPU {team.rank}: {tokens:,} tokens in {pools} pools", flush=True)
        marks: list[dict[str, object]] = []

        def mark() -> None:
            if held:
                marks.append({"step": step} | self.measure(held))
                print(f"held out: {json.dumps(marks[-1])}", flush=True)

        step, blocks, progress, pool = 0, 0, 0.0, 0
        for rows in sources:
            rows.divide(pools)
            rows.fill(0, self.target, self.cfg.taps)
            self.batch_loss(rows)[0].backward()  # compile outside the timed part
        if held:
            held.fill(0, self.target, self.cfg.taps)
        self.draft.zero_grad()
        mark()
        team.wait()
        began, saved = time.time(), time.time()
        minutes = (args.deadline - (began - STARTED)) / 60 if args.deadline else args.minutes
        print(f"ready after {began - STARTED:.0f} s", flush=True)
        rates: list[list[float]] = []
        while progress < 1.0:
            if int(progress * pools) > pool:
                pool += 1
                before = time.time()
                for rows in sources:
                    rows.fill(pool, self.target, self.cfg.taps)
                team.say(f"pool {pool}: {time.time() - before:.1f} s")
            rows = sources[1] if len(sources) > 1 and step % args.long_every == 0 else sources[0]
            loss, rate = self.batch_loss(rows)
            loss.backward()
            team.average(self.draft)
            torch.nn.utils.clip_grad_norm_(self.draft.parameters(), 1.0)
            self.optimiser.step(trapezoid(min(progress, 1.0), cool=args.cool))
            self.draft.zero_grad()
            step += 1
            blocks += rows.batch * args.anchors * team.size
            spent = (time.time() - began) / 60
            if not minutes:
                progress = step / args.steps
            elif step % PACE == 0:
                progress = team.agree(spent / minutes)
            if step % args.log == 1 or progress >= 1.0:
                rates.append([round(r, 3) for r in rate.tolist()])
                team.say(
                    f"step {step} {progress:.0%} {60 * spent:.0f} s "
                    f"loss {loss.item():.4f} hits {rates[-1]}"
                )
            if team.first and time.time() - saved > args.save:
                save_draft(self.draft, args.out)
                mark()
                saved = time.time()
        mark()
        return {
            "gpus": team.size,
            "steps": step,
            "seconds": round(time.time() - began, 1),
            "last_hits": rates[-1],
            "blocks": blocks,
            "held_out": marks,
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
        help="FILES.npz:LENGTH of regenerate.py (a pattern); a second one is the long kind",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the draft")
    parser.add_argument("--start", type=Path, help="draft to go on from")
    parser.add_argument("--layers", type=int, default=0, help="new layers up to so many")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=0.0, help="instead of --steps")
    parser.add_argument(
        "--deadline", type=float, help="seconds from the program's start, instead of --minutes"
    )
    parser.add_argument("--batch", type=int, default=96, help="rows of --unit tokens a step")
    parser.add_argument("--unit", type=int, default=448)
    parser.add_argument("--long-every", type=int, default=5)
    parser.add_argument("--anchors", type=int, default=48)
    parser.add_argument("--room", type=float, default=48.0, help="GB of taps kept at once")
    parser.add_argument(
        "--held", type=Path, help="FILE.npz from held-out prompts, of the first length"
    )
    parser.add_argument("--share", type=float, default=0.5, help="weight of the divergence")
    parser.add_argument("--reach", type=float, default=0.0, help="share of weights by reach")
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--adam-lr", type=float, default=0.002)
    parser.add_argument("--decay", type=float, default=0.02)
    parser.add_argument("--cool", type=float, default=0.5)
    parser.add_argument("--log", type=int, default=100)
    parser.add_argument("--save", type=float, default=100.0, help="seconds between two saves")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    distiller = Distiller(args)
    report = distiller.run()
    if distiller.team.first:
        save_draft(distiller.draft, args.out)
        (args.out.parent / "distil.json").write_text(json.dumps(report, indent=1) + "\n")
    distiller.team.leave()


if __name__ == "__main__":
    main()
