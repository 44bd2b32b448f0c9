"""A sweep: every cell of a grid is run, and what must agree is compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from specdec.aggregate import Aggregate, aggregate
from specdec.bench_grid import Budget, Cell, Grid, Group, Task
from specdec.errors import SpecdecError
from specdec.metrics import Metrics, measure
from specdec.round import Round

if TYPE_CHECKING:
    from specdec.generation import Result
    from specdec.peer import PeerRun


@dataclass(frozen=True)
class Run:
    """One generation of the sweep. tokens: what it emitted."""

    cell: Cell
    repeat: int
    metrics: Metrics
    tokens: tuple[int, ...]
    rounds: tuple[Round, ...]

    @classmethod
    def of(cls, cell: Cell, repeat: int, result: "Result") -> "Run":
        """What a generation came to."""
        return cls(cell, repeat, measure(result), result.tokens, result.rounds)


@dataclass(frozen=True)
class Sweep:
    """All whole runs, in the order in which they ran.

    kept: how many of the first ones an earlier process had made. peer: what another engine made
    of the same tasks; None where there is none. ended: the interrupt or the error that ended the
    sweep before its time.
    """

    grid: Grid
    runs: tuple[Run, ...]
    peer: "tuple[PeerRun, ...] | None" = None
    kept: int = 0
    ended: KeyboardInterrupt | SpecdecError | None = None

    @property
    def partial(self) -> bool:
        """Whether there are runs that were not made."""
        missing = len(self.runs) < self.grid.planned
        if self.peer is not None:
            missing |= len(self.peer) < self.grid.planned // len(self.grid.budgets)
        return self.ended is not None or missing

    def aggregate(self, group: Group, budget: Budget) -> Aggregate:
        """The figures of a group at a budget; speed-up against budget 1 if it was run."""
        plain = self._metrics(group, 1) if 1 in self.grid.budgets else None
        return aggregate(self._metrics(group, budget), plain)

    def disagreements(self) -> tuple[Task, ...]:
        """What was not done with the same tokens in every run that must agree."""
        hashes: dict[tuple[Task, Budget | None], set[str]] = {}
        for run in self.runs:
            every = self.grid.same_tokens or run.cell.temperature == 0
            key = run.cell.task, None if every else run.cell.budget
            hashes.setdefault(key, set()).add(run.metrics.token_sha256)
        # With budgets that follow the clock even repeats may draw differently.
        differing = {
            task: None
            for (task, budget), found in hashes.items()
            if len(found) > 1 and budget != "auto"
        }
        return tuple(differing)

    def label(self, task: Task) -> str:
        """A task in words: its prompt's id, and what else there is more than one of."""
        rest = self.grid.name(None, task.temperature, task.context)
        return f"{task.prompt} ({rest})" if rest else task.prompt

    @cached_property
    def _by_cell(self) -> dict[tuple[Task, Budget], list[Metrics]]:
        found: dict[tuple[Task, Budget], list[Metrics]] = {}
        for run in self.runs:
            found.setdefault((run.cell.task, run.cell.budget), []).append(run.metrics)
        return found

    def _metrics(self, group: Group, budget: Budget) -> list[list[Metrics]]:
        """Per prompt of the group, its repeats at the budget."""
        tasks = (
            Task(prompt.id, group.temperature, group.context)
            for prompt in self.grid.of_class(group.kind)
        )
        return [self._by_cell.get((task, budget), []) for task in tasks]


def sweep(
    generate: "Callable[[Cell], Result]",
    grid: Grid,
    on_run: "Callable[[Sweep, Run | PeerRun], None]",
    kept: Sequence[Run] = (),
    kept_peer: "Sequence[PeerRun]" = (),
    compete: "Callable[[Run], PeerRun] | None" = None,
) -> Sweep:
    """Run every cell `grid.repeats` times, after one untimed run per temperature and budget.

    generate: makes one run. on_run: told of the sweep so far and the run that has just ended.
    kept, kept_peer: runs that need not be made again. compete: lets another engine do what a run
    of budget 1 has just done. An interrupt or a SpecdecError ends the sweep; what was run until
    then is returned.
    """
    runs, peer = list(kept), list(kept_peer)
    there = {(run.cell, run.repeat) for run in runs}
    competed = {(one.task, one.repeat) for one in peer}
    left = {cell for r in range(grid.repeats) for cell in grid.cells if (cell, r) not in there}

    def so_far(ended: KeyboardInterrupt | SpecdecError | None = None) -> Sweep:
        beside = tuple(peer) if compete is not None else None
        return Sweep(grid, tuple(runs), beside, len(kept), ended)

    try:
        warm: set[tuple[float, Budget]] = set()
        for cell in grid.cells:  # first uses compile kernels and fill caches
            if cell in left and (cell.temperature, cell.budget) not in warm:
                warm.add((cell.temperature, cell.budget))
                generate(cell)
        for repeat in range(grid.repeats):
            for cell in grid.cells:
                if (cell, repeat) not in there:
                    runs.append(Run.of(cell, repeat, generate(cell)))
                    on_run(so_far(), runs[-1])
                if compete is None or cell.budget != 1 or (cell.task, repeat) in competed:
                    continue
                plain = next(r for r in reversed(runs) if (r.cell, r.repeat) == (cell, repeat))
                peer.append(compete(plain))
                on_run(so_far(), peer[-1])
    except (KeyboardInterrupt, SpecdecError) as error:
        return so_far(error)
    return so_far()
