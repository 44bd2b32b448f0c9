"""Our plain decoding against a peer's, per group of a sweep: speeds, ratios, equal tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specdec import intervals
from specdec.aggregate import median
from specdec.bench import Run, Sweep
from specdec.bench_grid import Group, Task
from specdec.peer import NAME, PeerRun
from specdec.units import interval, number, table


@dataclass(frozen=True)
class Match:
    """One figure of ours and the peer's: medians over prompts of the medians over repeats, and
    the median over prompts of each one's own ratio, ours over theirs, with its interval at 95 %
    confidence (intervals.median), None for fewer than six prompts."""

    ours: float | None
    theirs: float | None
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None


@dataclass(frozen=True)
class GroupMatch:
    """A group of a sweep. prompts: those both were run on; equal: with the same tokens."""

    group: Group
    prompts: int
    equal: int
    speed: Match
    first: Match


def matches(done: Sweep) -> list[GroupMatch]:
    """Of every group, runs of budget 1 against those that the peer made right after them."""
    plain = {(run.cell.task, run.repeat): run for run in done.runs if run.cell.budget == 1}
    pairs: dict[Task, list[tuple[Run, PeerRun]]] = {}
    for one in done.peer or ():
        pairs.setdefault(one.task, []).append((plain[one.task, one.repeat], one))
    found = []
    for group in done.grid.groups:
        of_group = {prompt.id for prompt in done.grid.of_class(group.kind)}
        tasks = [
            both
            for task, both in pairs.items()
            if task.prompt in of_group and task.context == group.context
        ]
        equal = sum(all(peer.first_difference is None for _, peer in both) for both in tasks)
        speed = _match(
            tasks,
            lambda run: run.metrics.decode_tokens_per_second,
            lambda peer: peer.decode_tokens_per_second,
        )
        first = _match(
            tasks,
            lambda run: run.metrics.seconds_to_first_token,
            lambda peer: peer.seconds_to_first_token,
        )
        found.append(GroupMatch(group, len(tasks), equal, speed, first))
    return found


def peer_report(done: Sweep, version: str) -> str:
    """A row per group, then on how many prompts the tokens agree and where they part."""
    rows: list[tuple[str, ...]] = [
        ("", "tok/s", NAME, "ratio", "95 %", "first s", NAME, "ratio", "equal tokens")
    ]
    found = matches(done)
    for one in found:
        rows.append(
            (
                done.grid.name(*one.group),
                number(one.speed.ours),
                number(one.speed.theirs),
                number(one.speed.ratio, 2),
                interval(one.speed.ratio_low, one.speed.ratio_high),
                number(one.first.ours, 2),
                number(one.first.theirs, 2),
                number(one.first.ratio, 3),
                f"{one.equal} of {one.prompts}",
            )
        )
    lines = [f"plain decoding against {NAME} {version}, same checkpoint and prompts", table(rows)]
    told: set[Task] = set()
    for peer in done.peer or ():
        if peer.first_difference is not None and peer.task not in told:
            told.add(peer.task)
            lines.append(
                f"{done.label(peer.task)}: tokens part at {peer.first_difference}, where {NAME} "
                f"prefers its own by {peer.gap:.1e} nats"
            )
    return "\n".join(lines)


def _match(
    tasks: Sequence[Sequence[tuple[Run, PeerRun]]],
    ours: Callable[[Run], float | None],
    theirs: Callable[[PeerRun], float | None],
) -> Match:
    left = [median([ours(run) for run, _ in both]) for both in tasks]
    right = [median([theirs(peer) for _, peer in both]) for both in tasks]
    ratios = [a / b if a is not None and b else None for a, b in zip(left, right, strict=True)]
    ratio = intervals.median([one for one in ratios if one is not None])
    return Match(median(left), median(right), ratio.value, ratio.low, ratio.high)
