"""Series: the runs of one file at one setting, which a report shows as one line or curve."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from specdec.prompts import ALL
from specdec.round import Round
from specdec.run_file import RecordedRun, RunFile


@dataclass(frozen=True)
class Series:
    """Runs that differ in prompt and repeat alone.

    name: unlike that of any other series of the report. file: its file's name.
    """

    name: str
    file: str
    budget: int | str
    temperature: float
    context: int | None
    runs: tuple[RecordedRun, ...]

    @property
    def plain(self) -> bool:
        """Whether it is autoregressive."""
        return self.budget == 1

    @property
    def work(self) -> str:
        """The same for series of the same prompts under the same conditions."""
        return repr((self.context, sorted(self.by_prompt)))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Classes of its prompts, then "all" unless there is just one."""
        kinds = tuple(dict.fromkeys(run.kind for run in self.runs))
        return kinds if len(kinds) == 1 else (*kinds, ALL)

    def of(self, kind: str) -> "Series":
        """The runs of one class."""
        if kind == ALL:
            return self
        runs = tuple(run for run in self.runs if run.kind == kind)
        return Series(self.name, self.file, self.budget, self.temperature, self.context, runs)

    @cached_property
    def by_prompt(self) -> dict[str, list[RecordedRun]]:
        """Per prompt its repeats."""
        found: dict[str, list[RecordedRun]] = {}
        for run in self.runs:
            found.setdefault(run.prompt, []).append(run)
        return found

    @property
    def first_rounds(self) -> list[Sequence[Round]]:
        """Per prompt the rounds of its first run: what acceptance is counted on."""
        return [runs[0].rounds for runs in self.by_prompt.values()]

    @property
    def all_rounds(self) -> list[Sequence[Round]]:
        """The rounds of every run: what times are counted on."""
        return [run.rounds for run in self.runs]


def series(files: Sequence[RunFile]) -> tuple[Series, ...]:
    """All series, files in order and plain decoding first."""
    found: dict[tuple[int, float, int | None, int | str], list[RecordedRun]] = {}
    for at, file in enumerate(files):
        for run in file.runs:
            found.setdefault((at, run.temperature, run.context, run.budget), []).append(run)
    temperatures = {temperature for _, temperature, _, _ in found}
    contexts = {context for _, _, context, _ in found}
    names = _file_names(files)
    done = []
    for (at, temperature, context, budget), runs in found.items():
        parts = ["autoregressive" if budget == 1 else f"budget {budget}"]
        if len(temperatures) > 1:
            parts.append(f"temperature {temperature:g}")
        if len(contexts) > 1:
            parts.append("context as it is" if context is None else f"context {context}")
        if len(files) > 1:
            parts.append(names[at])
        name = ", ".join(parts)
        done.append(Series(name, names[at], budget, temperature, context, tuple(runs)))
    return tuple(done)


def _file_names(files: Sequence[RunFile]) -> list[str]:
    """Names of files, with as many folders as it takes to tell them apart."""
    for parts in range(1, max(len(file.path.parts) for file in files) + 1):
        names = ["/".join((*file.path.parts[-parts:-1], file.path.stem)) for file in files]
        if len(set(names)) == len(names):
            return names
    return [f"{file.path.stem} ({at})" for at, file in enumerate(files, 1)]
