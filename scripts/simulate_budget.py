"""Budget auto played on recorded drafts, with costs that are given: no clock is looked at.

    python scripts/simulate_budget.py
    python scripts/simulate_budget.py --one 2.5 --node 0.05 --draft 1    # as on a GPU

Greedy text does not depend on budgets, so what the draft proposes at each place of it, and what of
that is accepted, is recorded once per prompt; any budget can then be played on it. Costs in
milliseconds: a pass of one row, each node more, a draft. The noise is in what budgets are told, not
in the result: speeds are those of the given costs.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import numpy as np

from specdec.auto_budget import Auto
from specdec.budget import Budget, Fixed
from specdec.demo_pair import PROMPTS
from specdec.load import Loaded, Settings, load
from specdec.prompts import ALL, read_prompts
from specdec.round import PhaseSeconds, Round
from specdec.round_costs import RoundCosts
from specdec.tree.draft_tree import DraftTree
from specdec.tree.walk import walk
from specdec.units import table

NODES, BEYOND = 16, 8  # of a tree; tokens recorded beyond the end: a block's
CATCHING_UP = 0.016  # milliseconds a token
BUDGETS = (2, 4, 6, 12)


@dataclass(frozen=True)
class Record:
    """A prompt's text and the whole tree that was drafted at each place of it."""

    kind: str
    tokens: list[int]
    trees: list[DraftTree]


class Look:
    """Drafts everything and verifies the root alone: goes through the text token by token."""

    def __init__(self) -> None:
        self.trees: list[DraftTree] = []

    def limit(self) -> int:
        return NODES

    def stays_plain(self) -> bool:
        return False

    def cut(self, tree: DraftTree) -> DraftTree:
        self.trees.append(tree)
        return tree.first(1)

    def learn(self, done: Round) -> None:
        pass


def record(loaded: Loaded, kind: str, text: str, count: int) -> Record:
    engine, look = loaded.engine, Look()
    first = engine.prefill(loaded.tokenizer.encode(text)).token
    assert first is not None
    tokens = [first]
    while len(tokens) < count + BEYOND:
        tokens += engine.step(look).tokens
    return Record(kind, tokens, look.trees)


def play(one: Record, budget: Budget, options: argparse.Namespace, seed: int) -> float:
    """Milliseconds for the text."""
    rng = np.random.default_rng(seed)
    at = untold = 0
    total = 0.0
    while at < options.tokens:
        limit, told, draft = budget.limit(), 0, 0.0
        tree = DraftTree.root(one.tokens[at])
        if limit > 1:
            tree, told = budget.cut(one.trees[at].first(limit + 1)), untold
            draft = options.draft + CATCHING_UP * told
        verify = options.one + options.node * (tree.rows - 1)
        # What the target chooses after a row of the path; no other is asked for.
        path, bonus = walk(tree, partial(_truth, one.tokens, at + 1, tree))
        times = np.array([draft, verify]) / 1e3 * np.exp(options.noise * rng.normal(size=2))
        seconds = PhaseSeconds(draft=times[0], verify=times[1])
        budget.learn(Round(tree, path, bonus, seconds, budget=limit, context=at, told=told))
        untold += len(path) - told
        at += len(path)
        total += draft + verify
    return total / at


def _truth(tokens: Sequence[int], first: int, tree: DraftTree, row: int) -> int:
    return tokens[first + tree.depths[row]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="default: the demo pair")
    parser.add_argument("--draft-model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--one", type=float, default=2.5, help="pass of one row, ms")
    parser.add_argument("--node", type=float, default=0.7, help="each node more, ms")
    parser.add_argument("--draft", type=float, default=1.95, help="a draft, ms")
    parser.add_argument("--noise", type=float, default=0.05, help="relative, of what is measured")
    parser.add_argument("--repeat", type=int, default=4)
    options = parser.parse_args()
    loaded = load(Settings(options.model, options.draft_model, budget=NODES))
    prompts = read_prompts(PROMPTS)
    records = [record(loaded, p.kind, p.text, options.tokens) for p in prompts]

    def mean(budget: Callable[[], Budget]) -> list[float]:
        """Speed against plain decoding per text, mean over repeats; `budget` is made for each."""
        turns = [
            [options.one / play(one, budget(), options, seed) for one in records]
            for seed in range(options.repeat)
        ]
        return [fmean(turn) for turn in zip(*turns, strict=True)]

    def kept() -> Budget:
        session.begin()
        return session

    session = Auto(NODES, RoundCosts(NODES))
    speeds = {str(nodes): mean(partial(Fixed, nodes)) for nodes in BUDGETS}
    speeds["auto"] = mean(kept)
    speeds["fresh"] = mean(lambda: Auto(NODES, RoundCosts(NODES)))
    print(_table(speeds, [one.kind for one in records]))


def _table(speeds: dict[str, list[float]], kinds: Sequence[str]) -> str:
    """Speeds against plain decoding: a row per class, the mean over its texts."""
    rows: list[tuple[str, ...]] = [("", *speeds, "auto/best fixed", "worst auto", "worst fresh")]
    for kind in [*dict.fromkeys(kinds), ALL]:
        some = [at for at, one in enumerate(kinds) if kind in (one, ALL)]
        means = {name: fmean(found[at] for at in some) for name, found in speeds.items()}
        best = max(1.0, *(means[str(nodes)] for nodes in BUDGETS))
        worst = (min(speeds[name][at] for at in some) for name in ("auto", "fresh"))
        figures = (*means.values(), means["auto"] / best, *worst)
        rows.append((f"{kind} ({len(some)})", *(f"{one:.2f}" for one in figures)))
    return table(rows)


if __name__ == "__main__":
    main()
