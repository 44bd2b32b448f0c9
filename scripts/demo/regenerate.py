"""Let the quantised target continue training prompts: the text the draft learns from.

Prompts (half of them document beginnings) are fed token by token through the recurrent form, then
the target goes on, greedily in most rows and at temperature 0.7 in the others. Writes one
``.npz`` with ``tokens`` [N, L] uint16, ``size`` [N] (prompt tokens) and ``end`` [N] (one past the
last token to learn from: a row stops after its first end-of-text, and ``--loop`` tokens after it
begins to repeat itself), and prints how many rows loop.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

import data
import export
from model import Target
from tokenise import EOS_ID, VOCAB


class Generator:
    """A fixed batch and length; one decoding step is captured once as a CUDA graph."""

    def __init__(self, model: Target, batch: int, length: int) -> None:
        self.model = model
        device = model.lm_head.weight.device
        self.states = model.states(batch, length)
        self.tokens = torch.zeros(batch, length + 1, dtype=torch.int64, device=device)
        self.size = torch.zeros(batch, dtype=torch.int64, device=device)
        self.heat = torch.zeros(batch, 1, device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self.length = length
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self.capture()

    def advance(self) -> None:
        ids = self.tokens.index_select(1, self.at).squeeze(1)
        logits = self.model.step(ids, self.states, self.at).float()
        noise = -torch.empty_like(logits).exponential_().log()  # Gumbel
        new = (logits + self.heat * noise).argmax(-1)
        follow = self.at + 1
        given = self.tokens.index_select(1, follow).squeeze(1)
        new = torch.where(follow < self.size, given, new)
        self.tokens.index_copy_(1, follow, new.unsqueeze(1))
        self.at.add_(1)

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
        for state in self.states:
            for tensor in state:
                tensor.zero_()
        self.tokens[:, : self.length] = rows
        self.size.copy_(size)
        self.heat.copy_(heat.unsqueeze(1))
        self.at.zero_()
        for _ in range(self.length - 1):
            if self.graph is None:
                self.advance()
            else:
                self.graph.replay()
        return self.tokens[:, : self.length].clone()


def ends(tokens: Tensor, size: Tensor) -> Tensor:
    """One past the first end-of-text of every response, or the row's length."""
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    stop = (tokens == EOS_ID) & (steps >= size.unsqueeze(1))
    first = torch.where(stop, steps, tokens.shape[1] - 1).amin(1)
    return first + 1


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=Path, required=True, help="quantised checkpoint")
    parser.add_argument("--tokens", type=Path, required=True, help="folder of tokenise.py")
    parser.add_argument("--out", type=Path, required=True, help="the .npz to write")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=0.0, help="instead of --rounds")
    parser.add_argument("--length", type=int, default=448)
    parser.add_argument("--low", type=int, default=32, help="shortest prompt")
    parser.add_argument("--high", type=int, default=160, help="longest prompt + 1")
    parser.add_argument("--warm", type=float, default=0.15, help="share of rows at T = 0.7")
    parser.add_argument(
        "--loop",
        type=int,
        default=1 << 16,
        help="tokens to keep after a row begins to repeat itself",
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    model = export.load(args.target, kind, device)
    newline = line_ends(args.target).to(device)
    stream = data.read(args.tokens / "train.bin", device)
    with torch.no_grad():
        generator = Generator(model, args.batch, args.length)
    kept: list[tuple[np.ndarray, ...]] = []
    began, new, fresh, looping = time.time(), 0, 0, 0
    i = 0
    while time.time() - began < 60 * args.minutes if args.minutes else i < args.rounds:
        rows, size = data.prompts(
            stream, newline, args.batch, args.low, args.high, args.length, args.seed * 1000 + i
        )
        heat = 0.7 * (torch.rand(args.batch, device=device) < args.warm)
        done = generator.run(rows, size, heat)
        stop = ends(done, size)
        first = repeats(done, size, stop)
        end = torch.minimum(stop, first + args.loop)
        new, fresh = new + int((end - size).sum()), fresh + int((first - size).sum())
        looping += int((first < stop).sum())
        kept.append(
            (
                done.cpu().numpy().astype(np.uint16),
                *(x.cpu().numpy().astype(np.int32) for x in (size, end)),
            )
        )
        i += 1
    tokens, size, end = (np.concatenate(part) for part in zip(*kept, strict=True))
    np.savez(args.out, tokens=tokens, size=size, end=end)
    report = {
        "rows": len(tokens),
        "new_tokens": new,
        "before_repeating": fresh,
        "repeating_share": round(looping / len(tokens), 3),
        "seconds": round(time.time() - began, 1),
    }
    args.out.with_suffix(".json").write_text(json.dumps(report) + "\n")
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
