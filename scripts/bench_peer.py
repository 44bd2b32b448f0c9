"""Measures specdec against mlx-lm on the same checkpoint, and against itself. Prints ratios.

    python scripts/bench_peer.py                # everything, on the demo pair
    python scripts/bench_peer.py --only peer start

Sections: `peer` plain decoding of specdec against mlx-lm, both on the CPU with float32 activations,
same prompts, runs interleaved, medians, tokens compared; `trees` acceptance and speed over budgets,
and best-first, spine and chain trees at equal numbers of verified rows; `start` time from starting
the process to the first byte of text; `memory` peak resident set against the printed plan.
Needs mlx-lm (`pip install ".[test]"`) for `peer` only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from specdec import bench
from specdec.demo_pair import DRAFT, PROMPTS, TARGET
from specdec.generation import Request, generate
from specdec.load import Loaded, Settings, load
from specdec.metrics import first_difference
from specdec.prompts import Prompt, read_prompts
from specdec.units import number, percent, size, table

SECTIONS = ("peer", "trees", "start", "memory")
TREES = ("best-first", "spine", "chain")


@dataclass(frozen=True)
class Timed:
    """One run: its tokens, seconds to the first one, tokens/s of the others."""

    tokens: tuple[int, ...]
    first_seconds: float
    decode_rate: float


class Peer:
    """mlx-lm's greedy decoding, every float of the model in float32."""

    def __init__(self, folder: Path) -> None:
        from mlx_lm.utils import load_model

        self.model, _ = load_model(folder)
        self.model.set_dtype(mx.float32)  # scales and biases of packed weights too
        mx.eval(self.model.parameters())

    def run(self, prompt: Sequence[int], count: int) -> tuple[Timed, list[mx.array]]:
        """`count` tokens after the prompt, and the log-probabilities each was chosen from."""
        from mlx_lm.generate import generate_step

        start = first = perf_counter()
        tokens: list[int] = []
        logprobs = []
        for token, logprob in generate_step(mx.array(list(prompt)), self.model, max_tokens=count):
            if not tokens:
                first = perf_counter()
            tokens.append(int(token))
            logprobs.append(logprob)
        rate = (len(tokens) - 1) / (perf_counter() - first)
        return Timed(tuple(tokens), first - start, rate), logprobs


def run_specdec(loaded: Loaded, prompt: Sequence[int], count: int) -> Timed:
    """`count` tokens by plain decoding."""
    result = generate(
        loaded.engine, loaded.tokenizer, Request(tuple(prompt), budget=1, max_tokens=count)
    )
    rate = (len(result.tokens) - 1) / result.decode_seconds
    return Timed(result.tokens, result.seconds_to_first_token, rate)


def peer_section(args: argparse.Namespace, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Plain decoding, specdec against mlx-lm."""
    print(f"\n== peer: {len(prompts)} prompts x {args.max_tokens} tokens x {args.repeat} repeats")
    loaded = load(_settings(args, budget=1))
    peer = Peer(args.model)
    encoded = [loaded.tokenizer.encode(prompt.text) for prompt in prompts]
    run_specdec(loaded, encoded[0], 8)
    peer.run(encoded[0], 8)
    ours: list[list[Timed]] = [[] for _ in prompts]
    theirs: list[list[Timed]] = [[] for _ in prompts]
    differing = []
    for repeat in range(args.repeat):
        for at, (prompt, tokens) in enumerate(zip(prompts, encoded, strict=True)):
            ours[at].append(run_specdec(loaded, tokens, args.max_tokens))
            timed, logprobs = peer.run(tokens, args.max_tokens)
            theirs[at].append(timed)
            position = first_difference(ours[at][-1].tokens, timed.tokens)
            if repeat == 0 and position is not None:
                gap = _top_two_gap(logprobs[position])
                differing.append({"prompt": prompt.id, "position": position, "gap": gap})
                print(f"{prompt.id}: tokens differ from {position} on, top-2 gap there {gap:.2e}")
    print(f"tokens equal on {len(prompts) - len(differing)} of {len(prompts)} prompts")
    rows = [("", "specdec", "mlx-lm", "ratio")]
    figures: dict[str, Any] = {"equal": len(prompts) - len(differing), "differing": differing}
    for name, value in (
        ("decode tok/s", lambda timed: timed.decode_rate),
        ("first token, s", lambda timed: timed.first_seconds),
    ):
        left, right = _medians(ours, value), _medians(theirs, value)
        ratio = statistics.median(a / b for a, b in zip(left, right, strict=True))
        one, other = statistics.median(left), statistics.median(right)
        rows.append((name, number(one, 2), number(other, 2), number(ratio, 3)))
        figures[name] = {"specdec": one, "mlx_lm": other, "ratio": ratio}
    print(table(rows))
    return figures


def trees_section(args: argparse.Namespace, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Budgets and kinds of trees: a budget is a number of drafted rows, whatever the kind."""
    budgets = tuple(sorted({1, *args.budgets}))
    print(f"\n== trees: budgets {budgets}, {args.max_tokens} tokens x {args.repeat} repeats")
    loaded = load(_settings(args, budget=max(budgets)))
    figures: dict[str, Any] = {}
    sweeps = {}
    for kind in TREES:

        def run(prompt: Prompt, budget: int, kind: str = kind) -> Any:
            tokens = tuple(loaded.tokenizer.encode(prompt.text))
            request = Request(tokens, budget=budget, tree=kind, max_tokens=args.max_tokens)
            return generate(loaded.engine, loaded.tokenizer, request)

        sweeps[kind] = bench.sweep(run, prompts, budgets, args.repeat, lambda run: None)
        print(f"\n-- {kind}\n{bench.report(sweeps[kind])}")
        figures[kind] = {
            name: {
                budget: {"acceptance_length": one.acceptance_length, "speedup": one.speedup}
                for budget in budgets
                for one in [sweeps[kind].aggregate(name, budget)]
            }
            for name in sweeps[kind].classes
        }
    hashes: dict[str, set[str]] = {}
    for swept in sweeps.values():
        for done in swept.runs:
            hashes.setdefault(done.prompt.id, set()).add(done.metrics.token_sha256)
    figures["equal"] = all(len(found) == 1 for found in hashes.values())
    print(f"\ntokens equal over all kinds and budgets: {figures['equal']}")
    rows = [("mean acceptance length", *(f"{b}" for b in budgets if b > 1))]
    for name in sweeps[TREES[0]].classes:
        for kind in TREES:
            lengths = (
                number(sweeps[kind].aggregate(name, budget).acceptance_length, 2)
                for budget in budgets
                if budget > 1
            )
            rows.append((f"{name}, {kind}", *lengths))
    print(table(rows))
    return figures


def start_section(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds from starting the process to the first byte on stdout."""
    print(f"\n== start: {args.repeat} processes, after one that warms the disk cache")
    seconds = []
    for _ in range(args.repeat + 1):
        start = perf_counter()
        with subprocess.Popen(
            [*_command(args), "--max-tokens", "16"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            seconds.append(perf_counter() - start)
            process.stdout.read()
    median = statistics.median(seconds[1:])
    print(f"first token after {median:.2f} s (median; all: {_list(seconds[1:])})")
    return {"median": median, "all": seconds[1:]}


def memory_section(args: argparse.Namespace) -> dict[str, Any]:
    """Peak resident set of a generation against its plan."""
    print("\n== memory")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        command = [*_command(args), "--max-tokens", str(args.max_tokens), "--json", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        memory = json.loads(path.read_text())["memory"]
    ratio = memory["process"] / memory["planned"]
    print(f"peak {size(memory['process'])}, planned {size(memory['planned'])}: {percent(ratio)}")
    return {**memory, "ratio": ratio}


def _command(args: argparse.Namespace) -> list[str]:
    return [
        *(sys.executable, "-m", "specdec", "generate"),
        *("--model", str(args.model), "--draft", str(args.draft)),
        *("--prompt", "def main():\n", "--raw", "--pin-layers", str(args.pin_layers)),
    ]


def _settings(args: argparse.Namespace, budget: int) -> Settings:
    draft = str(args.draft) if budget > 1 else None
    return Settings(model=str(args.model), draft=draft, pin_layers=args.pin_layers, budget=budget)


def _medians(runs: list[list[Timed]], value: Callable[[Timed], float]) -> list[float]:
    """Per prompt, the median over repeats."""
    return [statistics.median(map(value, repeats)) for repeats in runs]


def _top_two_gap(logprobs: mx.array) -> float:
    """How much better than the second token the first one was, in nats."""
    second, first = np.sort(np.array(logprobs).reshape(-1))[-2:]
    return float(first - second)


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def main() -> None:
    """Run the sections that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections")
    parser.add_argument("--model", type=Path, default=TARGET, help="target folder")
    parser.add_argument("--draft", type=Path, default=DRAFT, help="draft folder")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="JSON lines")
    parser.add_argument("--count", type=int, default=10, help="prompts per class")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--budgets", type=int, nargs="+", default=[2, 4, 6, 12])
    parser.add_argument("--pin-layers", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures")
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    chosen: dict[str, list[Prompt]] = {}
    for prompt in read_prompts(args.prompts):
        chosen.setdefault(prompt.kind, []).append(prompt)
    prompts = [prompt for of_kind in chosen.values() for prompt in of_kind[: args.count]]
    figures: dict[str, Any] = {}
    for section in args.only:
        if section == "peer":
            figures[section] = peer_section(args, prompts)
        elif section == "trees":
            figures[section] = trees_section(args, prompts)
        elif section == "start":
            figures[section] = start_section(args)
        else:
            figures[section] = memory_section(args)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
