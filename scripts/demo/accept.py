"""Measure a draft on held-out prompts: best-first trees walked along the target's greedy text.

The target continues every prompt greedily; since that text is what a verifier would accept, every
round can be replayed offline: draft at the round's anchor, grow the tree, count how deep the text
stays inside it, jump. Prints and writes, per prompt class: first-slot agreement over all
positions, hit rate per slot, and for the chain and several budgets the mean tokens a round (bonus
counted) with the share of rounds that reach each depth. ``_fresh`` classes count only the text
before a response first repeats eight of its own tokens.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections import defaultdict
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

import data
import export
from draft import Draft, load_draft
from model import Target
from regenerate import Generator, ends, line_ends, loops

ANCHORS = 64  # drafted at once


def best_first(logp: list[list[float]], ids: list[list[int]], budget: int) -> set[tuple[int, ...]]:
    """Token paths of the ``budget`` most probable prefixes; logp, ids: [depth][rank], sorted."""
    heap: list[tuple[float, tuple[int, ...]]] = [(-logp[0][0], (0,))]
    paths: set[tuple[int, ...]] = set()
    while heap and len(paths) < budget:
        cost, ranks = heapq.heappop(heap)
        paths.add(tuple(ids[d][r] for d, r in enumerate(ranks)))
        depth, last = len(ranks), ranks[-1]
        if last + 1 < len(ids[0]):
            step = logp[depth - 1][last] - logp[depth - 1][last + 1]
            heapq.heappush(heap, (cost + step, (*ranks[:-1], last + 1)))
        if depth < len(logp):
            heapq.heappush(heap, (cost - logp[depth][0], (*ranks, 0)))
    return paths


def accepted(paths: set[tuple[int, ...]], truth: list[int]) -> int:
    depth = 0
    while depth < len(truth) and tuple(truth[: depth + 1]) in paths:
        depth += 1
    return depth


@torch.no_grad()
def marginals(target: Target, draft: Draft, tokens: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Sorted log-probabilities and ids [B, T, block - 1, keep] of a block at every position."""
    _, taps, _, _ = target(tokens, draft.cfg.taps)
    joined, mask_row = torch.cat(taps, -1), target.model.embed_tokens.weight[draft.cfg.mask_id]
    batch, length = tokens.shape
    logps, ids = [], []
    for first in range(0, length, ANCHORS):
        anchors = torch.arange(first, min(first + ANCHORS, length), device=tokens.device)
        anchors = anchors.expand(batch, -1)
        bonus = target.embed(tokens.gather(1, anchors))
        out = draft(joined, bonus, mask_row, anchors)[:, :, 1:]
        top = target.logits(out).float().log_softmax(-1).topk(keep, -1)
        logps.append(top.values)
        ids.append(top.indices)
    return torch.cat(logps, 1), torch.cat(ids, 1)


def replay(
    tokens: list[int],
    logp: list[list[list[float]]],
    ids: list[list[list[int]]],
    size: int,
    end: int,
    budget: int,
) -> list[int]:
    """Accepted drafts of every round; budget 0 means the top-1 chain."""
    depths, at = [], size
    while at + 1 < end:
        truth = tokens[at + 1 : min(end, at + 1 + len(ids[at]))]
        if budget:
            got = accepted(best_first(logp[at], ids[at], budget), truth)
        else:
            got = accepted(
                {tuple(r[0] for r in ids[at][: d + 1]) for d in range(len(ids[at]))}, truth
            )
        depths.append(got)
        at += 1 + got
    return depths


def fresh_end(tokens: list[int], size: int, end: int, gram: int = 8) -> int:
    """Where a response first repeats ``gram`` tokens of itself, or its end."""
    seen: set[tuple[int, ...]] = set()
    for i in range(size, end - gram):
        piece = tuple(tokens[i : i + gram])
        if piece in seen:
            return i
        seen.add(piece)
    return end


def summary(depths: list[list[int]], slots: int) -> dict[str, object]:
    rounds = [d for row in depths for d in row]
    means = [sum(row) / len(row) + 1 for row in depths if row]
    reach = [
        round(sum(d >= k for d in rounds) / max(1, len(rounds)), 3) for k in range(1, slots + 1)
    ]
    return {
        "tokens_per_round": round(sum(rounds) / max(1, len(rounds)) + 1, 3),
        "mean_over_prompts": round(sum(means) / max(1, len(means)), 3),
        "reached": reach,
    }


def measure(
    target: Target,
    draft: Draft,
    rows: Tensor,
    size: Tensor,
    kinds: list[str],
    budgets: list[int],
    batch: int,
) -> dict[str, object]:
    """rows [N, L] with prompts in front -> figures per class."""
    slots = draft.cfg.block - 1
    generator = Generator(target, batch, rows.shape[1])
    depths: dict[tuple[str, int], list[list[int]]] = defaultdict(list)
    hits: dict[str, list[Tensor]] = defaultdict(list)
    looping: dict[str, list[bool]] = defaultdict(list)
    tokens: dict[str, int] = defaultdict(int)
    for first in range(0, len(rows), batch):
        part, lengths = rows[first : first + batch], size[first : first + batch]
        real = len(part)
        pad = batch - real
        part = torch.cat([part, part[-1:].expand(pad, -1)])
        lengths = torch.cat([lengths, lengths[-1:].expand(pad)])
        done = generator.run(part, lengths, torch.zeros(batch, device=rows.device))
        end = ends(done, lengths)
        logp, ids = marginals(target, draft, done, max(budgets))
        loop = loops(done.cpu().numpy(), lengths.cpu().numpy(), end.cpu().numpy())
        text, lp, top = done.tolist(), logp.tolist(), ids.tolist()
        for i in range(real):
            low, high = int(lengths[i]), int(end[i])
            looping[kinds[first + i]].append(bool(loop[i]))
            for kind, stop in (
                (kinds[first + i], high),
                (kinds[first + i] + "_fresh", fresh_end(text[i], low, high)),
            ):
                at = torch.arange(low, max(low, stop - slots), device=rows.device)
                ahead = done[i][at.unsqueeze(1) + torch.arange(1, slots + 1, device=rows.device)]
                hits[kind].append((ids[i, at, :, 0] == ahead).float())
                tokens[kind] += stop - low
                for budget in [0, *budgets]:
                    depths[kind, budget].append(replay(text[i], lp[i], top[i], low, stop, budget))
    report: dict[str, object] = {}
    for kind in hits:
        plain = kind.removesuffix("_fresh")
        rate = torch.cat(hits[kind]).mean(0).tolist()
        report[kind] = {
            "prompts": kinds.count(plain),
            "tokens": tokens[kind],
            "looping_share": round(sum(looping[plain]) / len(looping[plain]), 3),
            "first_slot_agreement": round(rate[0], 3),
            "hits_per_slot": [round(r, 3) for r in rate],
            "chain": summary(depths[kind, 0], slots),
            **{f"budget_{b}": summary(depths[kind, b], slots) for b in budgets},
        }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, help="jsonl with class and prompt")
    parser.add_argument("--tokens", type=Path, help="a held-out .bin to draw more prompts from")
    parser.add_argument("--count", type=int, default=128, help="prompts drawn from --tokens")
    parser.add_argument("--new", type=int, default=192, help="tokens to generate")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--budgets", type=int, nargs="+", default=[4, 6, 12, 22])
    parser.add_argument("--out", type=Path, required=True, help="the .json to write")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    torch.set_float32_matmul_precision("high")
    target = export.load(args.target, kind, device)
    draft = load_draft(args.draft, kind, device).eval()
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    sizes: list[int] = []
    kinds: list[str] = []
    listed: list[list[int]] = []
    if args.prompts:
        for line in args.prompts.read_text().splitlines():
            record = json.loads(line)
            listed.append(tokenizer.encode(record["prompt"]).ids)
            kinds.append(record["class"])
    if args.tokens:
        stream = data.read(args.tokens, "cpu")
        rows, size = data.prompts(stream, line_ends(args.target), args.count, 40, 160, 160, seed=7)
        listed += [row[:n].tolist() for row, n in zip(rows, size.tolist(), strict=True)]
        kinds += ["drawn"] * args.count
    sizes = [len(ids) for ids in listed]
    length = -(-(max(sizes) + args.new) // 64) * 64
    table = torch.zeros(len(listed), length, dtype=torch.int64, device=device)
    for i, ids in enumerate(listed):
        table[i, : len(ids)] = torch.tensor(ids)
    with torch.no_grad():
        report = measure(
            target,
            draft,
            table,
            torch.tensor(sizes, device=device),
            kinds,
            args.budgets,
            min(args.batch, len(listed)),
        )
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1), flush=True)


if __name__ == "__main__":
    main()
