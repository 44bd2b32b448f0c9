"""What several rows cost against one: per operation, per pass, and in whole rounds.

    python scripts/bench_kernels.py                     # the demo pair
    python scripts/bench_kernels.py --rows 1 7 --budgets 1 6

One process, one table after the other: times of a layer's parts and of a whole verify pass by the
number of rows; then rounds by budget, with the time of every phase and the speed against budget 1.
All numbers of rows take turns, and so do all budgets, so that a machine that slows down slows all
of them; medians. Computes where `choose_backend` says, SPECDEC_KERNELS decides otherwise.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from specdec.budget import Fixed
from specdec.demo_pair import PROMPTS
from specdec.kernels.array import Array, evaluate
from specdec.kernels.executor import threads
from specdec.kernels.layout import TreeLayout
from specdec.kernels.linear import linear
from specdec.kernels.norm import Norm
from specdec.kernels.weight import Weight
from specdec.load import Loaded, Settings, load
from specdec.prompts import read_prompts
from specdec.round import Round
from specdec.target.attention import Attention
from specdec.target.gated_delta import GatedDelta
from specdec.target.mlp import MoE
from specdec.target.passes import TreePass
from specdec.tree.draft_tree import DraftTree
from specdec.units import number, table

Operation = Callable[[Array, TreePass], Any]


def main() -> None:
    arguments = _arguments()
    most = max(*arguments.rows, 8)
    pair = load(Settings(arguments.model, arguments.draft, budget=most, threads=arguments.threads))
    prompt = pair.tokenizer.encode(read_prompts(PROMPTS)[0].text)
    pair.engine.prefill(prompt)
    who = f"{pair.backend.name}, {threads()} threads, {pair.backend.dtype}"
    print(f"{who}, {pair.engine.target.length} tokens committed")
    print(f"\nmicroseconds by rows, and times one row\n{_by_rows(pair, arguments)}")
    if pair.engine.draft is not None:
        print(f"\nmilliseconds a round by budget\n{_by_budget(pair, prompt, arguments)}")


def _by_rows(pair: Loaded, arguments: argparse.Namespace) -> str:
    counts = arguments.rows
    lines: list[tuple[str, ...]] = [
        ("", *(f"{rows} rows" for rows in counts), *(f"{r}/{counts[0]}" for r in counts[1:]))
    ]
    for name, run in {**_operations(pair), "verify pass": None}.items():
        seconds: dict[int, list[float]] = {rows: [] for rows in counts}
        for turn in range(-2, arguments.repeat):  # the first two compile and fill caches
            for rows in counts:
                spent = _once(pair, run, rows)
                if turn >= 0:
                    seconds[rows].append(spent)
        times = [1e6 * median(seconds[rows]) for rows in counts]
        ratios = (number(time / times[0], 2) for time in times[1:])
        lines.append((name, *(number(time) for time in times), *ratios))
    return table(lines)


def _once(pair: Loaded, run: Operation | None, rows: int) -> float:
    """Seconds of one operation, or of a verify pass where there is none."""
    target, rng = pair.engine.target, np.random.default_rng(rows)
    parents = (np.arange(rows, dtype=np.int32) - 1) // 2
    tokens = rng.integers(target.config.vocab_size, size=rows).astype(np.int32)
    if run is None:
        tree = DraftTree(tokens, parents, np.zeros(rows))
        start = perf_counter()
        target.verify(tree)
        return perf_counter() - start
    hidden = rng.standard_normal((rows, target.config.hidden_size)).astype(np.float32)
    x = pair.backend.place(mx.array(hidden).astype(pair.backend.dtype))
    this = TreePass(target.state, target.rope, TreeLayout(parents))
    start = perf_counter()
    evaluate(*_arrays(run(x, this)))
    return perf_counter() - start


def _arrays(value: Any) -> list[Array]:
    if isinstance(value, list | tuple):
        return [array for item in value for array in _arrays(item)]
    return [value.rows] if hasattr(value, "rows") else [value]


def _operations(pair: Loaded) -> dict[str, Operation]:
    """Parts of the first layer of each kind, norms and residuals included."""
    target = pair.engine.target
    found: dict[str, Operation] = {}
    for layer in target.layers:
        mixer, mlp = layer.mixer, layer.mlp
        if isinstance(mixer, GatedDelta):
            found.setdefault("gated delta layer", mixer)
            found.setdefault("its projections", partial(_projected, mixer.inputs, mixer.norm))
        if isinstance(mixer, Attention):
            found.setdefault("attention layer", mixer)
            found.setdefault("its queries, keys", partial(_projected, mixer.qkv, mixer.norm))
        if isinstance(mlp, MoE):
            found.setdefault("experts", mlp)
    found["head"] = partial(_projected, partial(_linear, target.head), target.norm)
    return found


def _projected(project: Callable[[Array, Norm], Any], norm: Norm, x: Array, this: TreePass) -> Any:
    return project(x, norm)


def _linear(weight: Weight, x: Array, norm: Norm) -> Array:
    return linear(x, weight, norm)


def _by_budget(pair: Loaded, prompt: Sequence[int], arguments: argparse.Namespace) -> str:
    engine, budgets = pair.engine, arguments.budgets
    rounds: dict[int, list[Round]] = {budget: [] for budget in budgets}
    speeds: dict[int, list[float]] = {budget: [] for budget in budgets}
    for turn in range(-1, max(1, arguments.repeat // 10)):
        for budget in budgets:
            engine.prefill(prompt)
            made: list[Round] = []
            start = perf_counter()
            while sum(len(one.tokens) for one in made) < arguments.tokens:
                made.append(engine.step(Fixed(budget)))
            spent = perf_counter() - start
            if turn >= 0:
                rounds[budget] += made
                speeds[budget].append(sum(len(one.tokens) for one in made) / spent)
    phases = ("draft", "build", "verify", "commit")
    lines: list[tuple[str, ...]] = [
        ("budget", *phases, "tokens/round", "tok/s", f"times {budgets[0]}")
    ]
    for budget in budgets:
        times = (
            1e3 * median(getattr(one.seconds, phase) for one in rounds[budget]) for phase in phases
        )
        length = np.mean([len(one.tokens) for one in rounds[budget]])
        ratio = median(
            mine / first for mine, first in zip(speeds[budget], speeds[budgets[0]], strict=True)
        )
        lines.append(
            (
                str(budget),
                *(number(time, 2) for time in times),
                number(float(length), 2),
                number(median(speeds[budget])),
                number(ratio, 2),
            )
        )
    return table(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="default: the demo pair")
    parser.add_argument("--draft")
    parser.add_argument("--threads", type=int, help="default: the cores there are")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 7, 16])
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 2, 4, 6, 12])
    parser.add_argument("--repeat", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=96, help="of a generation")
    return parser.parse_args()


if __name__ == "__main__":
    main()
