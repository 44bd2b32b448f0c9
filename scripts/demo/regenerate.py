"""Let the quantised target continue training prompts: the text the draft learns from.

Prompts are fed token by token through the recurrent form, then the target goes on, greedily in most
rows and at temperature 0.7 in the others. With ``--prompts`` (a file of ``mine.py``) a row that has
ended makes room for the next prompt at once; with ``--tokens`` prompts are drawn from a token file,
half of them document beginnings, and all rows of a batch run to its length. Writes one ``.npz``
with ``tokens`` [N, L] uint16, ``size`` [N] (prompt tokens), ``first`` [N] (where the row begins to
repeat itself) and ``end`` [N] (one past the last token to learn from: a row stops after its first
end-of-text, and ``--loop`` tokens after ``first``), and prints how many rows repeat themselves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

import data
import export
from model import Target
from tokenise import EOS_ID, VOCAB

EVERY = 8  # steps between two looks for rows that have ended
Piece = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # tokens, size, first, stop, end


class Generator:
    """A fixed batch and length; one decoding step is captured once as a CUDA graph.

    Every row has a position of its own, ``at`` [B], that of the last token it has.
    """

    def __init__(self, model: Target, batch: int, length: int, plain: bool = False) -> None:
        self.model = model
        device = model.lm_head.weight.device
        self.states = model.states(batch, length)
        self.tokens = torch.zeros(batch, length + 1, dtype=torch.int64, device=device)
        self.size = torch.zeros(batch, dtype=torch.int64, device=device)
        self.heat = torch.zeros(batch, 1, device=device)
        self.at = torch.zeros(batch, dtype=torch.int64, device=device)
        self.length = length
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda" and not plain:
            self.capture()

    def advance(self) -> None:
        ids = self.tokens.gather(1, self.at.unsqueeze(1)).squeeze(1)
        logits = self.model.step(ids, self.states, self.at).float()
        noise = -torch.empty_like(logits).exponential_().log()  # Gumbel
        new = (logits + self.heat * noise).argmax(-1)
        follow = (self.at + 1).unsqueeze(1)
        given = self.tokens.gather(1, follow)
        new = torch.where(follow < self.size.unsqueeze(1), given, new.unsqueeze(1))
        self.tokens.scatter_(1, follow, new)
        self.at.add_(1).clamp_(max=self.length - 1)

    def capture(self) -> None:
        for layer in self.model.model.layers:
            layer.step = torch.compile(layer.step)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.advance()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.advance()

    @torch.no_grad()
    def run(self, rows: Tensor, size: Tensor, heat: Tensor) -> Tensor:
        """rows [B, L] (prompt in front), size [B], heat [B] -> the same rows continued, [B, L]."""
        self.tokens[:, : self.length] = rows
        self.size.copy_(size)
        self.heat.copy_(heat.unsqueeze(1))
        self.at.zero_()
        self.steps(self.length - 1)
        return self.tokens[:, : self.length].clone()

    def steps(self, count: int) -> None:
        for _ in range(count):
            if self.graph is None:
                self.advance()
            else:
                self.graph.replay()

    @torch.no_grad()
    def flow(self, feed: Feed, new: int, loop: int, warm: float, minutes: float) -> Iterator[Piece]:
        """Rows in the order in which they end; stops after ``minutes`` or the last prompt.

        A row ends at its end-of-text, ``loop`` tokens after it begins to repeat itself, or after
        ``new`` tokens.
        """
        self.at.fill_(self.length - 1)
        self.size.zero_()
        busy = torch.zeros(len(self.at), dtype=torch.bool, device=self.at.device)
        idle = torch.arange(len(self.at), device=self.at.device)
        began, done, told, last = time.time(), 0, 0.0, 0
        for turn in itertools.count():
            rows, size = feed.take(len(idle))
            at = idle[: len(rows)]
            self.tokens[at] = rows
            self.size[at], self.at[at], busy[at] = size, 0, True
            self.heat[at] = 0.7 * (torch.rand(len(at), 1, device=at.device) < warm)
            spent = time.time() - began
            if not busy.any() or (minutes and spent > 60 * minutes):
                return
            if turn == 4 or spent - told > 20:
                pace = 1000 * (spent - told) / EVERY / (turn - last)
                print(f"{spent:.0f} s: {pace:.1f} ms a step, {done:,} rows", flush=True)
                told, last = spent, turn
            self.steps(EVERY)
            known = torch.minimum(self.at + 1, self.size + new)
            stop = ends(self.tokens, self.size, known)
            first = repeats(self.tokens, self.size, stop)
            end = torch.minimum(stop, first + loop)
            over = (stop < known) | (end < known) | (known == self.size + new)
            over |= self.at == self.length - 1
            idle = (over & busy).nonzero().squeeze(1)
            busy[idle] = False
            done += len(idle)
            text = self.tokens[idle, : self.length]
            yield text, self.size[idle], first[idle], stop[idle], end[idle]


class Feed:
    """Piece ``part`` (which one, of how many) of a file of ``mine.py``, one prompt after another.

    It is gone through ``passes`` times, after the first with each prompt cut at a random place.
    """

    def __init__(
        self, path: Path, length: int, device: str, part: tuple[int, int], passes: int
    ) -> None:
        self.stream = data.read(path, device)
        stops = (self.stream == EOS_ID).nonzero().squeeze(1)
        starts = torch.cat([stops.new_zeros(1), stops[:-1] + 1])
        which, parts = part
        piece = slice(len(stops) * which // parts, len(stops) * (which + 1) // parts)
        self.starts, self.whole = starts[piece], (stops - starts)[piece]
        self.size = self.whole
        self.length, self.next, self.left = length, 0, passes

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        """Up to ``count`` rows [n, length + 1], of which the first ``size`` [n] tokens count."""
        if count and self.next >= len(self.starts) and self.left > 1:
            self.next, self.left = 0, self.left - 1
            share = 0.3 + 0.6 * torch.rand(len(self.whole), device=self.whole.device)
            self.size = (self.whole * share).long().clamp_min(8)
        part = slice(self.next, self.next + count)
        starts, size = self.starts[part], self.size[part]
        self.next += len(starts)
        steps = torch.arange(self.length + 1, device=starts.device)
        where = (starts.unsqueeze(1) + steps).clamp_max(len(self.stream) - 1)
        return self.stream[where].long(), size


def ends(tokens: Tensor, size: Tensor, known: Tensor | None = None) -> Tensor:
    """One past the first end-of-text of every response, or the row's (known) length."""
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    stop = (tokens == EOS_ID) & (steps >= size.unsqueeze(1))
    first = torch.where(stop, steps, tokens.shape[1] - 1).amin(1)
    return first + 1 if known is None else torch.minimum(first + 1, known)


def repeats(tokens: Tensor, size: Tensor, end: Tensor, gram: int = 8) -> Tensor:
    """Where every response first repeats ``gram`` tokens of itself, or its end: [B]."""
    powers = [pow(1000003, k, 1 << 47) for k in range(gram)]  # a gram's key fits 63 bits
    mix = torch.tensor(powers, device=tokens.device)
    keys = (tokens.unfold(1, gram, 1) * mix).sum(-1)
    at = torch.arange(keys.shape[1], device=tokens.device)
    inside = (at >= size.unsqueeze(1)) & (at < end.unsqueeze(1) - gram)
    found = torch.where(inside, keys, -1 - at).sort(dim=1, stable=True)  # equal keys: by position
    again = found.values[:, 1:] == found.values[:, :-1]
    first = torch.where(again, found.indices[:, 1:], tokens.shape[1]).amin(1)
    return torch.minimum(first, end)


def loops(tokens: np.ndarray, size: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Rows whose response repeats itself: fewer than 40 % of its 6-grams are distinct."""
    out = np.zeros(len(tokens), dtype=bool)
    for i, row in enumerate(tokens):
        part = row[size[i] : end[i]].tolist()
        grams = [tuple(part[j : j + 6]) for j in range(len(part) - 5)]
        out[i] = len(grams) > 32 and len(set(grams)) < 0.4 * len(grams)
    return out


def line_ends(tokenizer: Path) -> Tensor:
    """[V] bool: tokens whose text ends with a line break."""
    table = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return torch.tensor([(table.id_to_token(i) or "").endswith("Ċ") for i in range(VOCAB)])


def batches(args: argparse.Namespace, generator: Generator) -> Iterator[Piece]:
    """Rows drawn from a token file, one batch of full length after another."""
    device = generator.at.device
    newline = line_ends(args.target).to(device)
    stream = data.read(args.tokens / "train.bin", str(device))
    began = time.time()
    for i in itertools.count():
        if time.time() - began > 60 * args.minutes if args.minutes else i == args.rounds:
            return
        rows, size = data.prompts(
            stream, newline, args.batch, args.low, args.high, args.length, args.seed * 1000 + i
        )
        heat = 0.7 * (torch.rand(args.batch, device=device) < args.warm)
        done = generator.run(rows, size, heat)
        stop = ends(done, size)
        first = repeats(done, size, stop)
        yield done, size, first, stop, torch.minimum(stop, first + args.loop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=Path, required=True, help="quantised checkpoint")
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--prompts", type=Path, help="file of mine.py")
    kinds.add_argument("--tokens", type=Path, help="folder of tokenise.py")
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--minutes", type=float, default=0.0, help="0: all prompts, or --rounds")
    parser.add_argument("--length", type=int, default=448, help="tokens of a row")
    parser.add_argument("--warm", type=float, default=0.15, help="share of rows at T = 0.7")
    parser.add_argument(
        "--loop",
        type=int,
        default=1 << 16,
        help="tokens to keep after a row begins to repeat itself",
    )
    parser.add_argument("--new", type=int, default=128, help="longest answer to --prompts")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    parser.add_argument("--passes", type=int, default=1, help="times to go through --prompts")
    parser.add_argument("--rounds", type=int, default=20, help="batches from --tokens")
    parser.add_argument("--low", type=int, default=32, help="shortest prompt from --tokens")
    parser.add_argument("--high", type=int, default=160, help="longest prompt + 1, likewise")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help="no compiled step, no CUDA graph")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    model = export.load(args.target, kind, device)
    with torch.no_grad():
        generator = Generator(model, args.batch, args.length, args.plain)
    began = time.time()
    if args.prompts:
        feed = Feed(args.prompts, args.length, device, tuple(args.part), args.passes)
        pieces = generator.flow(feed, args.new, args.loop, args.warm, args.minutes)
    else:
        pieces = batches(args, generator)
    kept: list[tuple[np.ndarray, ...]] = []
    new, fresh, looping = 0, 0, 0
    for done, size, first, stop, end in pieces:
        new, fresh = new + int((end - size).sum()), fresh + int((first - size).sum())
        looping += int((first < stop).sum())
        numbers = (x.cpu().numpy().astype(np.int32) for x in (size, first, end))
        kept.append((done.cpu().numpy().astype(np.uint16), *numbers))
    tokens, sizes, starts, stops = (np.concatenate(part) for part in zip(*kept, strict=True))
    np.savez(args.out, tokens=tokens, size=sizes, first=starts, end=stops)
    report = {
        "rows": len(sizes),
        "prompt_tokens": int(sizes.sum()),
        "new_tokens": new,
        "before_repeating": fresh,
        "repeating_share": round(looping / len(sizes), 3),
        "seconds": round(time.time() - began, 1),
    }
    args.out.with_suffix(".json").write_text(json.dumps(report) + "\n")
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
