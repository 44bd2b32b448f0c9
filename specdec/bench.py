"""A sweep of prompts and budgets: who runs when, what is compared, how it is told.

Repeats are the outer loop and budgets the inner one, so that a machine that slows down slows down
every budget alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specdec.aggregate import Aggregate, aggregate
from specdec.errors import SpecdecError
from specdec.metrics import Metrics, measure
from specdec.prompts import ALL, Prompt
from specdec.units import number, percent, size, table

if TYPE_CHECKING:
    from specdec.generation import Result


@dataclass(frozen=True)
class Run:
    """One generation of the sweep."""

    prompt: Prompt
    budget: int
    repeat: int
    metrics: Metrics


@dataclass(frozen=True)
class Sweep:
    """All whole runs, in the order in which they ran.

    ended: the interrupt or the error that ended the sweep before its time; None otherwise.
    """

    prompts: tuple[Prompt, ...]
    budgets: tuple[int, ...]
    repeats: int
    runs: tuple[Run, ...]
    ended: KeyboardInterrupt | SpecdecError | None = None

    @property
    def planned(self) -> int:
        """How many runs a whole sweep has."""
        return len(self.prompts) * len(self.budgets) * self.repeats

    @property
    def classes(self) -> tuple[str, ...]:
        """Prompt classes in file order, then "all" if there is more than one."""
        kinds = tuple(dict.fromkeys(prompt.kind for prompt in self.prompts))
        return kinds if len(kinds) == 1 else (*kinds, ALL)

    def aggregate(self, kind: str, budget: int) -> Aggregate:
        """The figures of a class at a budget; speed-up against budget 1 if it was run."""
        plain = self._groups(kind, 1) if 1 in self.budgets else None
        return aggregate(self._groups(kind, budget), plain)

    def disagreements(self) -> tuple[str, ...]:
        """Ids of prompts whose tokens were not the same in every run."""
        hashes: dict[str, set[str]] = {}
        for run in self.runs:
            hashes.setdefault(run.prompt.id, set()).add(run.metrics.token_sha256)
        return tuple(name for name, found in hashes.items() if len(found) > 1)

    def _groups(self, kind: str, budget: int) -> list[list[Metrics]]:
        """Per prompt of the class, its repeats at the budget."""
        return [
            [run.metrics for run in self.runs if run.prompt == prompt and run.budget == budget]
            for prompt in self.prompts
            if kind in (prompt.kind, ALL)
        ]


def sweep(
    generate: "Callable[[Prompt, int], Result]",
    prompts: Sequence[Prompt],
    budgets: Sequence[int],
    repeats: int,
    on_run: Callable[[Run], None],
) -> Sweep:
    """Run every prompt at every budget, `repeats` times, after one untimed run per budget.

    `generate(prompt, budget)` makes one run; `on_run` is told of each as it ends. An interrupt or
    a SpecdecError ends the sweep; what was run until then is returned.
    """
    runs: list[Run] = []
    ended: KeyboardInterrupt | SpecdecError | None = None
    try:
        for budget in budgets:  # first uses compile kernels and fill caches
            generate(prompts[0], budget)
        for repeat in range(repeats):
            for prompt in prompts:
                for budget in budgets:
                    runs.append(Run(prompt, budget, repeat, measure(generate(prompt, budget))))
                    on_run(runs[-1])
    except (KeyboardInterrupt, SpecdecError) as error:
        ended = error
    return Sweep(tuple(prompts), tuple(budgets), repeats, tuple(runs), ended)


def report(done: Sweep) -> str:
    """One table per class, a row per budget, then whether all runs agree."""
    blocks = [_class_table(done, kind) for kind in done.classes] if done.runs else []
    if done.ended is not None:
        blocks.insert(0, f"PARTIAL: ended after {len(done.runs)} of {done.planned} runs")
    differing = done.disagreements()
    changed = [one for run in done.runs if (one := run.metrics.substitutions) is not None]
    if changed:
        choices, substituted = (
            sum(one.choices for one in changed),
            sum(one.substituted for one in changed),
        )
        blocks.append(
            f"NOT EXACT (--cache-tolerance): {substituted} of {choices} choices of experts were "
            f"substituted ({percent(substituted / choices if choices else None)})"
        )
    if differing:
        blocks.append("tokens DIFFER between runs of: " + ", ".join(differing))
    elif done.ended is None:
        blocks.append(f"tokens equal over all budgets and repeats, {len(done.prompts)} prompts")
    elif done.runs:
        blocks.append("tokens equal over the runs that were made")
    slower = [
        str(budget)
        for budget in done.budgets
        if budget > 1 and (done.aggregate(done.classes[-1], budget).speedup or 1) < 1
    ]
    if slower:
        blocks.append("SLOWER than plain decoding at budget " + ", ".join(slower))
    return "\n\n".join(blocks)


def _class_table(done: Sweep, kind: str) -> str:
    rows: list[tuple[str, ...]] = [
        (
            "budget",
            "decode tok/s",
            "speed-up",
            "acceptance",
            "P(>=1)",
            "P(>=2)",
            "P(>=4)",
            "first token s",
            "hit rate",
            "read/token",
        )
    ]
    for budget in done.budgets:
        one = done.aggregate(kind, budget)
        depths = [percent(one.depths[k - 1]) if len(one.depths) >= k else "-" for k in (1, 2, 4)]
        rows.append(
            (
                str(budget),
                number(one.decode_tokens_per_second),
                number(one.speedup, 2),
                number(one.acceptance_length, 2),
                *depths,
                number(one.seconds_to_first_token, 2),
                percent(one.effective_hit_rate),
                "-" if one.bytes_per_token is None else size(one.bytes_per_token),
            )
        )
    count = done.aggregate(kind, done.budgets[0]).prompts
    return (
        f"{kind} ({count} prompts, {done.repeats} repeats; speeds and times are medians, "
        f"the rest means)\n{table(rows)}"
    )
