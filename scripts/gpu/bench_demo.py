"""The demo pair: budgets against plain decoding, and equality of the tokens."""

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from specdec.budget import Fixed
from specdec.demo_pair import PROMPTS
from specdec.engine import Engine
from specdec.kernels.executor import use_gpu_kernels
from specdec.kernels.gpu.limits import refused
from specdec.load import Settings, load
from specdec.prompts import read_prompts
from specdec.units import table

TREES = ("best-first", "spine", "chain")


def generate(
    engine: Engine, prompt: Sequence[int], budget: int, kind: str, count: int
) -> tuple[list[int], int, float]:
    """`count` tokens whatever they are, rounds, and the seconds after the first token."""
    first = engine.prefill(prompt, drafting=budget > 1).token
    assert first is not None
    tokens, rounds, start = [first], 0, perf_counter()
    while len(tokens) < count:
        tokens += engine.step(Fixed(budget), kind).tokens
        rounds += 1
    return tokens, rounds, perf_counter() - start


def sweep(
    engine: Engine, prompts: Sequence[Sequence[int]], budgets: Sequence[int], count: int
) -> list[dict[str, Any]]:
    """Tokens per second of each budget over all prompts, the budgets taking turns."""
    for budget in budgets:
        for prompt in prompts[:3]:  # until paths of all kinds have occurred: kernels compile
            generate(engine, prompt, budget, TREES[0], count)
    spent = dict.fromkeys(budgets, 0.0)
    made, rounds = dict.fromkeys(budgets, 0), dict.fromkeys(budgets, 0)
    for prompt in prompts:
        for budget in budgets:
            tokens, turns, seconds = generate(engine, prompt, budget, TREES[0], count)
            spent[budget] += seconds
            made[budget] += len(tokens) - 1
            rounds[budget] += turns
    base = made[budgets[0]] / spent[budgets[0]]
    return [
        {
            "budget": b,
            "tokens_per_second": made[b] / spent[b],
            "speedup": made[b] / spent[b] / base,
            "acceptance_length": made[b] / rounds[b],
            "round_ms": spent[b] / rounds[b] * 1e3,
        }
        for b in budgets
    ]


def equality(
    engine: Engine, prompts: Sequence[Sequence[int]], budgets: Sequence[int], total: int
) -> dict[str, Any]:
    """Plain decoding against speculation of changing budgets and kinds, over `total` tokens."""
    drafting = [b for b in budgets if b > 1]
    count, compared, differing = -(-total // len(prompts)), 0, 0
    differences = []
    for at, prompt in enumerate(prompts):
        budget, kind = drafting[at % len(drafting)], TREES[at % len(TREES)]
        plain = generate(engine, prompt, 1, TREES[0], count)[0][:count]
        other = generate(engine, prompt, budget, kind, count)[0][:count]
        wrong = [i for i, (a, b) in enumerate(zip(plain, other, strict=True)) if a != b]
        compared += count
        differing += len(wrong)
        if wrong:
            differences.append({"prompt": at, "budget": budget, "tree": kind, "first": wrong[0]})
    return {"tokens": compared, "differing": differing, "differences": differences}


def run(
    budgets: Sequence[int], prompts: int, count: int, total: int, kernels: bool
) -> dict[str, Any]:
    """Figures of the demo pair, the table and the bars.

    prompts, count: of the sweep; total: tokens compared.
    """
    budgets = sorted({1, *budgets})
    loaded = load(Settings(budget=max(budgets), context=2048))
    if kernels:
        use_gpu_kernels(True)
    engine = loaded.engine
    assert engine.target.experts.all_pinned, "too little memory for all experts"
    print(f"backend {loaded.backend.name}, {loaded.backend.dtype}: {loaded.backend.why}")
    by_kind: dict[str, list[list[int]]] = {}
    for prompt in read_prompts(PROMPTS):
        by_kind.setdefault(prompt.kind, []).append(loaded.tokenizer.encode(prompt.text))
    chosen = [p for of_kind in by_kind.values() for p in of_kind[: -(-prompts // len(by_kind))]]
    everything = [p for of_kind in by_kind.values() for p in of_kind]
    figures: dict[str, Any] = {"backend": loaded.backend.name, "exact": loaded.backend.exact}
    figures["sweep"] = sweep(engine, chosen, budgets, count)
    rows = [("budget", "tok/s", "speed-up", "acceptance", "round ms")]
    for f in figures["sweep"]:
        rate, ms = f"{f['tokens_per_second']:.1f}", f"{f['round_ms']:.2f}"
        rows.append(
            (str(f["budget"]), rate, f"{f['speedup']:.2f}", f"{f['acceptance_length']:.2f}", ms)
        )
    print(table(rows))
    best = max(f["speedup"] for f in figures["sweep"])
    met = "met" if best >= 2.5 else "NOT MET"
    print(f"BAR best budget: {best:.2f}, at least 2.5: {met}", flush=True)
    same = figures["equality"] = equality(engine, everything, budgets, total)
    figures["refused"] = list(refused)
    print(f"BAR {same['differing']} of {same['tokens']} tokens differ: {same['differences'][:6]}")
    for words in figures["refused"]:
        print(f"REFUSED {words}")
    return figures
