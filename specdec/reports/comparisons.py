"""Comparisons: two series on the prompts that both have, prompt by prompt.

A ratio of speeds is the median over prompts of each prompt's own ratio. With few prompts its
interval comes from blocks of the text (`specdec.text_times`): it tells of changes within the runs,
not between one day and another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from specdec.aggregate import median
from specdec.intervals import (
    NOTHING,
    PROMPTS,
    Clusters,
    Estimate,
    difference,
    paired,
    per_prompt,
)
from specdec.intervals import median as median_estimate
from specdec.reports.series import Series
from specdec.run_file import RecordedRun
from specdec.text_times import block_times

CUT_OFF = "interrupted"

Pairs = Sequence[tuple[Sequence[RecordedRun], Sequence[RecordedRun]]]
"""Per prompt the repeats of the one and of the other series."""


@dataclass(frozen=True)
class Comparison:
    """`series` against `against`, on one class of prompts.

    speed: ratio of decode tokens per second. length: difference of mean acceptance lengths.
    tokens_equal: whether every prompt's runs emitted the same, cut-off runs as far as they came.
    """

    series: str
    against: str
    kind: str
    prompts: int
    speed: Estimate
    length: Estimate
    tokens_equal: bool


def compare(one: Series, other: Series, kind: str) -> Comparison | None:
    """The comparison of a class; None where the two have no prompt of it in common."""
    left, right = one.of(kind).by_prompt, other.of(kind).by_prompt
    pairs = [(left[name], right[name]) for name in left if name in right]
    if not pairs:
        return None
    return Comparison(
        series=one.name,
        against=other.name,
        kind=kind,
        prompts=len(pairs),
        speed=_speed(pairs),
        length=_length(pairs),
        tokens_equal=all(_agree([*ours, *theirs]) for ours, theirs in pairs),
    )


def _agree(runs: Sequence[RecordedRun]) -> bool:
    whole = max((run.tokens for run in runs), key=len)
    return all(
        run.tokens == (whole[: len(run.tokens)] if run.metrics.finish == CUT_OFF else whole)
        for run in runs
    )


def comparisons(every: Sequence[Series]) -> tuple[Comparison, ...]:
    """Each speculative series against plain decoding; each series of a later file against its
    counterpart in the first: that of the same budget or, where there is none, any."""
    done = []
    for one in every:
        rivals = []
        if not one.plain:
            rivals.append(_rival(one, [other for other in every if other.plain]))
        if one.file != every[0].file:
            first = [other for other in every if other.file == every[0].file]
            same = [other for other in first if other.budget == one.budget]
            others = [other for other in first if not other.plain and not one.plain]
            rivals.append(_rival(one, same) or _rival(one, others))
        for other in {rival.name: rival for rival in rivals if rival is not None}.values():
            found = [compare(one, other, kind) for kind in one.kinds]
            done += [comparison for comparison in found if comparison is not None]
    return tuple(done)


def _rival(one: Series, others: Sequence[Series]) -> Series | None:
    """The series with a prompt in common, one of the same file before others."""
    common = [other for other in others if one.by_prompt.keys() & other.by_prompt.keys()]
    return min(common, key=lambda other: other.file != one.file, default=None)


def _speed(pairs: Pairs) -> Estimate:
    ratios = []
    for ours, theirs in pairs:
        speed, base = (
            median([run.metrics.decode_tokens_per_second for run in runs])
            for runs in (ours, theirs)
        )
        if speed and base:
            ratios.append(speed / base)
    value = median(ratios)
    if len(ratios) >= PROMPTS or value is None:
        return median_estimate(ratios)
    return paired(value, [block_times(ours, theirs) for ours, theirs in pairs])


def _length(pairs: Pairs) -> Estimate:
    """Prompts are paired where they are the clusters."""
    sides = [
        Clusters.of([[(one.accepted + 1, 1) for one in runs[0].rounds] for runs in side])
        for side in zip(*pairs, strict=True)
    ]
    if any(not side.sums for side in sides):
        return NOTHING
    if all(side.unit == "prompts" for side in sides) and len(sides[0].sums) == len(sides[1].sums):
        gaps = [a / b - c / d for (a, b), (c, d) in zip(*(s.sums for s in sides), strict=True)]
        each = Clusters(tuple((gap, 1.0) for gap in gaps), tuple(range(len(gaps))), "prompts")
        return per_prompt(each)
    return difference(*map(per_prompt, sides))
