"""Report: everything that is said of some run files, in whatever format it is said."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from specdec.intervals import told
from specdec.reports.comparisons import Comparison, comparisons
from specdec.reports.figures import Figures, figures
from specdec.reports.series import Series, series
from specdec.run_file import RunFile


@dataclass(frozen=True)
class Report:
    """files: as they were read. series: their runs, grouped."""

    files: tuple[RunFile, ...]
    series: tuple[Series, ...]

    @classmethod
    def of(cls, files: Sequence[RunFile]) -> "Report":
        """The report of at least one file."""
        return cls(tuple(files), series(files))

    @cached_property
    def figures(self) -> tuple[Figures, ...]:
        """Of every series and class."""
        return tuple(figures(one, kind) for one in self.series for kind in one.kinds)

    @cached_property
    def totals(self) -> tuple[Figures, ...]:
        """Of every series, all classes together."""
        whole = {(one.name, one.kinds[-1]) for one in self.series}
        return tuple(one for one in self.figures if (one.series, one.kind) in whole)

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Of series with prompts in common."""
        return comparisons(self.series)

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What a reader must know before believing a figure."""
        return tuple(_warnings(self))


def _warnings(report: Report) -> list[str]:
    words = []
    for file in report.files:
        if not file.runs:
            words.append(f"{file.path}: PARTIAL: no run was made")
        elif file.partial:
            words.append(f"{file.path}: PARTIAL: it was interrupted; figures are of what was run")
        if file.environment.get("exact") is False:
            words.append(f"{file.path}: NOT EXACT: tokens may depend on the budget")
        for run in file.runs:
            changed = run.metrics.substitutions
            if changed is not None and changed.substituted:
                words.append(
                    f"{file.path}: NOT EXACT: --cache-tolerance changed choices of experts"
                )
                break
    for name in ("machine", "processor", "device", "kernels", "threads", "mlx"):
        found = {str(file.environment.get(name)) for file in report.files}
        if len(found) > 1:
            words.append(
                f"the files were made with different {name} ({', '.join(sorted(found))}): "
                "their speeds do not compare"
            )
    models = {str(file.settings.get("model") or "the demo pair") for file in report.files}
    if len(models) > 1:
        words.append(f"the files are of different models: {', '.join(sorted(models))}")
    kept = {(len(file.plan.pinned), file.plan.slots) for file in report.files}
    if len(kept) > 1:
        plans = ", ".join(f"{pins} layers pinned and {slots} slots" for pins, slots in sorted(kept))
        words.append(f"the files kept different experts in memory: {plans}")
    words += _strangers(report)
    for one in report.comparisons:
        if not one.tokens_equal and one.kind == _total(report, one.series):
            freed = [why for name, why in _freed(report) if name in (one.series, one.against)]
            what = f"differ, as they may with {freed[0]}," if freed else "DIFFER"
            words.append(f"tokens {what} between {one.series} and {one.against}")
        if _is_slower(one, report):
            even = one.speed.high is not None and one.speed.high >= 1
            words.append(
                f"{one.series} ({one.kind}) was {'no faster' if even else 'SLOWER'} than plain "
                f"decoding: {told(one.speed)} times its speed"
            )
    return words


def _freed(report: Report) -> list[tuple[str, str]]:
    """Series whose tokens need not be those of other budgets, and the option that says so."""
    found = []
    for one in report.series:
        first = one.runs[0]
        file = next(file for file in report.files if any(run is first for run in file.runs))
        if file.settings.get("accept") == "swor" and one.temperature and not one.plain:
            found.append((one.name, "--accept swor"))
        if file.settings.get("cache_tolerance"):
            found.append((one.name, "--cache-tolerance"))
    return found


def _strangers(report: Report) -> list[str]:
    """Files that nothing compares with any other."""
    home = {one.name: one.file for one in report.series}
    met = {
        name
        for one in report.comparisons
        if home[one.series] != home[one.against]
        for name in (home[one.series], home[one.against])
    }
    alone = sorted(set(home.values()) - met)
    if len(set(home.values())) < 2 or not alone:
        return []
    return [
        f"not compared with other files, for want of a prompt with the same model, sampling and "
        f"limits: {', '.join(alone)}"
    ]


def _total(report: Report, name: str) -> str:
    return next(one.kinds[-1] for one in report.series if one.name == name)


def _is_slower(one: Comparison, report: Report) -> bool:
    """All prompts together, or a class whose whole interval lies below 1."""
    plain = any(other.plain for other in report.series if other.name == one.against)
    least = one.speed.value if one.kind == _total(report, one.series) else one.speed.high
    return plain and least is not None and least < 1
