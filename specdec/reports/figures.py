"""Figures of a series: everything that a report says of it, class by class."""

from collections.abc import Sequence
from dataclasses import dataclass

from specdec import statistics as stats
from specdec.aggregate import median
from specdec.intervals import PROMPTS, Clusters, Estimate, pooled
from specdec.intervals import median as median_estimate
from specdec.metrics import Phase
from specdec.ratio import ratio
from specdec.reports.series import Series
from specdec.run_file import RecordedRun


@dataclass(frozen=True)
class LayerRate:
    """Experts of one layer over all runs: share of requests found in memory, bytes read."""

    layer: int
    pinned: bool
    hit_rate: float | None
    bytes_read: int


@dataclass(frozen=True)
class Figures:
    """One class of prompts of one series. Medians and means as in `specdec.aggregate`.

    speed: decode tokens per second; prefill: prompt tokens per second; first: seconds to the first
    token. length: tokens committed per round. experts, misses, stall: per round, what unpinned
    layers asked for, what of that had to be read, and milliseconds waited. hit_rate: pinned layers
    included.
    """

    series: str
    file: str
    kind: str
    budget: int | str
    prompts: int
    runs: int
    tokens: int
    rounds: int
    speed: Estimate
    prefill: float | None
    first: float | None
    length: Estimate
    acceptance_rate: float | None
    lengths: tuple[stats.Length, ...]
    depths: tuple[stats.DepthRate, ...]
    ranks: tuple[stats.RankRate, ...]
    calibration: stats.Calibration
    chosen: tuple[stats.Chosen, ...]
    phases: tuple[Phase, ...]
    costs: tuple[stats.Cost, ...]
    experts: Estimate
    misses: Estimate
    stall: Estimate
    hit_rate: float | None
    bytes_per_token: float | None
    layers: tuple[LayerRate, ...]


def figures(of: Series, kind: str) -> Figures:
    """The figures of a class; `stats` says what each is."""
    part = of.of(kind)
    first, every = part.first_rounds, part.all_rounds
    each = [run.metrics for run in part.runs]
    prompts = list(part.by_prompt.values())
    repeats = [[run.rounds for run in runs] for runs in prompts]
    drafted = sum(one.tree.rows - 1 for rounds in first for one in rounds)
    accepted = sum(one.accepted for rounds in first for one in rounds)
    rounds = sum(map(len, every))
    asked = sum(one.experts.hits + one.experts.misses for one in each)
    return Figures(
        series=part.name,
        file=part.file,
        kind=kind,
        budget=part.budget,
        prompts=len(prompts),
        runs=len(part.runs),
        tokens=sum(one.generated_tokens for one in each),
        rounds=rounds,
        speed=_speed(prompts),
        prefill=median([median([r.metrics.prefill_tokens_per_second for r in p]) for p in prompts]),
        first=median([median([r.metrics.seconds_to_first_token for r in p]) for p in prompts]),
        length=stats.length(first),
        acceptance_rate=ratio(accepted, drafted),
        lengths=stats.lengths(first),
        depths=stats.depths(first),
        ranks=stats.ranks(first),
        calibration=stats.calibration(first),
        chosen=stats.chosen(every),
        phases=_phases(part.runs),
        costs=stats.costs(every),
        experts=stats.per_round(repeats, lambda one: one.experts),
        misses=stats.per_round(repeats, lambda one: one.misses),
        stall=stats.per_round(repeats, lambda one: 1000 * one.stall),
        hit_rate=ratio(
            sum(one.experts.hits + one.experts.pinned_requests for one in each),
            asked + sum(one.experts.pinned_requests for one in each),
        ),
        bytes_per_token=ratio(
            sum(one.experts.bytes_read for one in each), sum(one.generated_tokens for one in each)
        ),
        layers=_layers(part.runs),
    )


def speeds(prompts: Sequence[Sequence[RecordedRun]]) -> list[float]:
    """Per prompt the median decode tokens per second of its repeats, where there is one."""
    found = [median([run.metrics.decode_tokens_per_second for run in runs]) for runs in prompts]
    return [one for one in found if one is not None]


def _speed(prompts: Sequence[Sequence[RecordedRun]]) -> Estimate:
    """Median over prompts; with few prompts its interval is that of tokens over seconds of rounds,
    about the median."""
    each = speeds(prompts)
    if len(each) >= PROMPTS or not each:
        return median_estimate(each)
    clusters = Clusters.of(
        [
            [(len(one.tokens), sum(vars(one.seconds).values())) for one in _typical(runs).rounds]
            for runs in prompts
        ]
    )
    value, rounds = median(each), pooled(clusters)
    if value is None or not rounds.value or rounds.low is None or rounds.high is None:
        return Estimate(value, unit="blocks", count=len(clusters.sums))
    scale = value / rounds.value
    return Estimate(value, rounds.low * scale, rounds.high * scale, "blocks", rounds.count)


def _typical(runs: Sequence[RecordedRun]) -> RecordedRun:
    """The repeat of median speed."""
    ordered = sorted(runs, key=lambda run: run.metrics.decode_tokens_per_second or 0.0)
    return ordered[len(ordered) // 2]


def _phases(runs: Sequence[RecordedRun]) -> tuple[Phase, ...]:
    """Milliseconds per round over all runs, and the share of their decode time."""
    rounds = sum(run.metrics.rounds for run in runs)
    spent: dict[str, float] = {}
    for run in runs:
        for phase in run.metrics.phases:
            spent[phase.name] = spent.get(phase.name, 0.0) + phase.ms_per_round * run.metrics.rounds
    total = sum(spent.values())
    return tuple(
        Phase(name, value / rounds, ratio(value, total) or 0.0) for name, value in spent.items()
    )


def _layers(runs: Sequence[RecordedRun]) -> tuple[LayerRate, ...]:
    found: dict[int, list[int]] = {}
    pinned: dict[int, bool] = {}
    for run in runs:
        for one in run.metrics.experts.layers:
            sums = found.setdefault(one.layer, [0, 0, 0])
            sums[0] += one.hits
            sums[1] += one.misses
            sums[2] += one.bytes_read
            pinned[one.layer] = one.pinned
    return tuple(
        LayerRate(layer, pinned[layer], ratio(hits, hits + misses), read)
        for layer, (hits, misses, read) in sorted(found.items())
    )
