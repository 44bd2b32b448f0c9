"""What a sweep runs: prompts, temperatures, context lengths and budgets, and who comes when.

Repeats are the outer loop and budgets the inner one, so that a machine that slows down slows down
every budget alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

from specdec.prompts import ALL, Prompt

Budget = int | Literal["auto"]


@dataclass(frozen=True)
class Cell:
    """What is run in one go.

    temperature: 0 is greedy. context: tokens that the prompt is brought to, None for its own.
    """

    prompt: Prompt
    temperature: float
    context: int | None
    budget: Budget

    @property
    def task(self) -> "Task":
        """What is asked for, whoever does it with whatever budget."""
        return Task(self.prompt.id, self.temperature, self.context)


class Task(NamedTuple):
    """What must come out the same for every budget. prompt: an id."""

    prompt: str
    temperature: float
    context: int | None


class Group(NamedTuple):
    """Cells that are told of together, a row per budget."""

    kind: str
    temperature: float
    context: int | None


@dataclass(frozen=True)
class Grid:
    """The cells of a sweep; each is run `repeats` times.

    same_tokens: whether every budget is to emit the same tokens at temperatures above 0.
    """

    prompts: tuple[Prompt, ...]
    budgets: tuple[Budget, ...]
    repeats: int
    temperatures: tuple[float, ...] = (0.0,)
    contexts: tuple[int | None, ...] = (None,)
    same_tokens: bool = True

    @property
    def cells(self) -> Iterator[Cell]:
        """In the order in which they are run."""
        for parts in product(self.prompts, self.temperatures, self.contexts, self.budgets):
            prompt, temperature, context, budget = parts
            yield Cell(prompt, temperature, context, budget)

    @property
    def planned(self) -> int:
        """How many runs a whole sweep has."""
        parts = (self.prompts, self.temperatures, self.contexts, self.budgets)
        count = self.repeats
        for part in parts:
            count *= len(part)
        return count

    @property
    def classes(self) -> tuple[str, ...]:
        """Prompt classes in file order, then "all" if there is more than one."""
        kinds = tuple(dict.fromkeys(prompt.kind for prompt in self.prompts))
        return kinds if len(kinds) == 1 else (*kinds, ALL)

    @property
    def groups(self) -> Iterator[Group]:
        """In the order in which they are told of."""
        for kind, temperature, context in product(self.classes, self.temperatures, self.contexts):
            yield Group(kind, temperature, context)

    def of_class(self, kind: str) -> tuple[Prompt, ...]:
        """The prompts of a class."""
        return tuple(prompt for prompt in self.prompts if kind in (prompt.kind, ALL))

    def name(self, kind: str | None, temperature: float, context: int | None) -> str:
        """What sets a group or a task apart: only what has more than one value here; maybe ""."""
        parts = [kind] if kind is not None else []
        if len(self.temperatures) > 1:
            parts.append(f"temperature {temperature:g}")
        if len(self.contexts) > 1:
            parts.append(f"context {context}")
        return ", ".join(parts)
