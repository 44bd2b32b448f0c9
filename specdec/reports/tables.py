"""Tables: a report's figures in words and numbers, the same for every format that people read."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from specdec.intervals import CONFIDENCE, Estimate, told
from specdec.reports.figures import Figures
from specdec.reports.report import Report
from specdec.units import number, percent, size


@dataclass(frozen=True)
class Table:
    """name: what the page calls it. left: columns of words."""

    name: str
    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: tuple[int, ...] = (0, 1)


def tables(report: Report) -> Iterator[Table]:
    """All tables that have a row, in the order in which they are told; classes one by one."""
    every = report.figures
    for table in (
        _speeds(every),
        _comparisons(report),
        _acceptance(every),
        _lengths(every),
        _depths(every),
        _ranks(every),
        _calibration(every),
        _chosen(every),
        _phases(every),
        _costs(every),
        _experts(every),
        _layers(every),
    ):
        if table.rows:
            yield table


def unit(one: Estimate) -> str:
    """What an interval is over."""
    return f"{one.count} {one.unit}" if one.low is not None else "-"


def _speeds(every: Iterable[Figures]) -> Table:
    return Table(
        "speed",
        "Speed",
        "Decode tokens per second, prefill excluded: median over prompts of the median over "
        f"repeats, with its {100 * CONFIDENCE:.0f} % interval. One over blocks (of rounds) tells "
        "of these prompts and these runs only.",
        ("run", "class", "prompts", "decode tok/s", "over", "prefill tok/s", "first token s"),
        tuple(
            (
                one.series,
                one.kind,
                str(one.prompts),
                told(one.speed, 1),
                unit(one.speed),
                number(one.prefill),
                number(one.first, 3),
            )
            for one in every
        ),
    )


def _comparisons(report: Report) -> Table:
    return Table(
        "comparisons",
        "Comparisons",
        "Pairs of the same prompt: the median ratio of decode speeds, and by how many tokens per "
        "round the mean acceptance lengths differ.",
        ("run", "against", "class", "prompts", "speed-up", "over", "length", "tokens"),
        tuple(
            (
                one.series,
                one.against,
                one.kind,
                str(one.prompts),
                told(one.speed),
                unit(one.speed),
                told(one.length),
                "equal" if one.tokens_equal else "DIFFER",
            )
            for one in report.comparisons
        ),
        (0, 1, 2),
    )


def _acceptance(every: Iterable[Figures]) -> Table:
    return Table(
        "acceptance",
        "Acceptance",
        "Mean acceptance length: tokens committed per round, the mean over prompts. accepted: of "
        "all drafted nodes.",
        ("run", "class", "rounds", "tokens per round", "over", "accepted"),
        tuple(
            (
                one.series,
                one.kind,
                str(sum(bar.rounds for bar in one.lengths)),
                told(one.length),
                unit(one.length),
                percent(one.acceptance_rate),
            )
            for one in every
            if one.budget != 1
        ),
    )


def _lengths(every: Iterable[Figures]) -> Table:
    return Table(
        "lengths",
        "Accepted lengths",
        "Tokens committed per round: one bonus token and the accepted draft tokens.",
        ("run", "class", "tokens", "rounds", "share"),
        tuple(
            (one.series, one.kind, str(bar.length), str(bar.rounds), percent(bar.share))
            for one in every
            if one.budget != 1
            for bar in one.lengths
        ),
    )


def _depths(every: Iterable[Figures]) -> Table:
    return Table(
        "depths",
        "Acceptance by depth",
        "reached: rounds that accepted at least so many draft tokens. rate: of the rounds that "
        "accepted the depth above and had drafted further, those that accepted again.",
        ("run", "class", "depth", "reached %", "visits", "rate %"),
        tuple(
            (
                one.series,
                one.kind,
                str(at.depth),
                told(at.reached, 1, 100),
                str(at.visits),
                told(at.rate, 1, 100),
            )
            for one in every
            for at in one.depths
        ),
    )


def _ranks(every: Iterable[Figures]) -> Table:
    return Table(
        "ranks",
        "Acceptance by sibling rank",
        "Rank 0 is the draft's likeliest child of a node. rate: of the accepted nodes with so many "
        "children and one more, those whose child of this rank was accepted.",
        ("run", "class", "rank", "visits", "rate %", "of accepted"),
        tuple(
            (
                one.series,
                one.kind,
                str(at.rank),
                str(at.visits),
                told(at.rate, 1, 100),
                percent(at.share),
            )
            for one in every
            for at in one.ranks
        ),
    )


def _calibration(every: Iterable[Figures]) -> Table:
    rows = []
    for one in every:
        for part in one.calibration.bins:
            rows.append(
                (
                    one.series,
                    one.kind,
                    f"{part.low:.1f} to {part.high:.1f}",
                    str(part.nodes),
                    percent(part.predicted),
                    told(part.accepted, 1, 100),
                )
            )
        if one.calibration.error is not None:
            off = one.calibration
            words = f"error {percent(off.error)}, bias {100 * (off.bias or 0.0):+.1f} %"
            rows.append(
                (one.series, one.kind, "all", str(sum(b.nodes for b in off.bins)), words, "-")
            )
    return Table(
        "calibration",
        "Calibration of the draft",
        "Drafted nodes by the probability that the draft gave the path down to them, and the share "
        "that was accepted. error: expected calibration error; bias above 0: too sure of itself.",
        ("run", "class", "path probability", "nodes", "predicted", "accepted %"),
        tuple(rows),
    )


def _chosen(every: Iterable[Figures]) -> Table:
    return Table(
        "chosen",
        "Nodes per round",
        "How many nodes rounds verified; 0 is a round of plain decoding.",
        ("run", "class", "nodes", "rounds", "share"),
        tuple(
            (one.series, one.kind, str(bar.nodes), str(bar.rounds), percent(bar.share))
            for one in every
            if one.budget != 1
            for bar in one.chosen
        ),
    )


def _phases(every: Iterable[Figures]) -> Table:
    return Table(
        "phases",
        "Phases of a round",
        "Mean milliseconds per round, and share of the decode time.",
        ("run", "class", "phase", "ms", "share"),
        tuple(
            (one.series, one.kind, phase.name, number(phase.ms_per_round, 3), percent(phase.share))
            for one in every
            for phase in one.phases
        ),
    )


def _costs(every: Iterable[Figures]) -> Table:
    return Table(
        "costs",
        "Cost of a verify pass",
        "Milliseconds by rows (the root and every node): median, lower and upper quartile.",
        ("run", "class", "rows", "passes", "median ms", "quartiles"),
        tuple(
            (
                one.series,
                one.kind,
                str(at.rows),
                str(at.rounds),
                number(at.median, 3),
                f"{at.low:.3f} to {at.high:.3f}",
            )
            for one in every
            for at in one.costs
        ),
    )


def _experts(every: Iterable[Figures]) -> Table:
    return Table(
        "experts",
        "Experts",
        "Per round: distinct experts that layers which are not pinned asked for, those that had to "
        "be read, and the time waited. The hit rate counts pinned layers.",
        ("run", "class", "asked", "read", "waited ms", "hit rate", "read/token"),
        tuple(
            (
                one.series,
                one.kind,
                told(one.experts, 1),
                told(one.misses, 2),
                told(one.stall, 3),
                percent(one.hit_rate),
                "-" if one.bytes_per_token is None else size(one.bytes_per_token),
            )
            for one in every
        ),
    )


def _layers(every: Iterable[Figures]) -> Table:
    return Table(
        "layers",
        "Hit rate by layer",
        "Share of requested experts that were in memory; pinned layers hold all.",
        ("run", "class", "layer", "kept", "hit rate", "read"),
        tuple(
            (
                one.series,
                one.kind,
                str(at.layer),
                "pinned" if at.pinned else "slots",
                percent(at.hit_rate),
                size(at.bytes_read),
            )
            for one in every
            for at in one.layers
        ),
        (0, 1, 3),
    )
