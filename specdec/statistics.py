"""What a group of runs says of its draft: lengths, depths, ranks, calibration, budgets, costs.

A group is given as prompts, each the rounds of one of its runs in order: repeats of a setting draft
and emit the same, so they say nothing new about acceptance. Figures about time take all repeats.
docs/metrics.md gives the definitions with examples; intervals: specdec.intervals.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest

from specdec.intervals import NOTHING, Clusters, Estimate, Sums, per_prompt, pooled, share
from specdec.round import Round

BINS = 10
"""Bins of the calibration, of equal width from 0 to 1."""

Prompts = Sequence[Sequence[Round]]


@dataclass(frozen=True)
class Length:
    """Rounds that committed `length` tokens, the bonus token among them."""

    length: int
    rounds: int
    share: float


@dataclass(frozen=True)
class DepthRate:
    """What became of depth `depth` (the root's children are at 1).

    reached: share of all rounds that accepted at least so many draft tokens.
    visits: rounds that accepted the depth above and had drafted more below it.
    rate: share of the visits in which one of those was accepted.
    """

    depth: int
    reached: Estimate
    visits: int
    rate: Estimate


@dataclass(frozen=True)
class RankRate:
    """What became of the `rank`-th likeliest sibling (0: the likeliest).

    visits: accepted nodes, roots among them, that had so many children and one more.
    rate: share of the visits in which this child was the accepted one.
    share: of all accepted draft tokens.
    """

    rank: int
    visits: int
    rate: Estimate
    share: float | None


@dataclass(frozen=True)
class Bin:
    """Drafted nodes whose path the draft gave a probability from `low` to `high`.

    predicted: the mean of those probabilities. accepted: the share that was accepted.
    """

    low: float
    high: float
    nodes: int
    predicted: float
    accepted: Estimate


@dataclass(frozen=True)
class Calibration:
    """Whether the draft's path probabilities are the shares that get accepted.

    error: expected calibration error, the mean over nodes of |predicted - accepted| of their bin
    (Guo et al. 2017, "On Calibration of Modern Neural Networks").
    bias: mean over nodes of predicted - accepted; above 0 the draft is too sure of itself.
    """

    bins: tuple[Bin, ...]
    error: float | None
    bias: float | None


@dataclass(frozen=True)
class Cost:
    """Time of verify passes of `rows` rows (the root and every node): milliseconds, quartiles."""

    rows: int
    rounds: int
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Chosen:
    """Rounds in which so many nodes were verified; 0 is a round of plain decoding."""

    nodes: int
    rounds: int
    share: float


def length(prompts: Prompts) -> Estimate:
    """Mean acceptance length: the mean over prompts of tokens committed per round."""
    return _least(1.0, per_prompt(_clusters(prompts, lambda one: (one.accepted + 1, 1))))


def lengths(prompts: Prompts) -> tuple[Length, ...]:
    """How many rounds committed 1, 2, ... tokens, up to the most that any did."""
    counts = Counter(one.accepted + 1 for one in _rounds(prompts))
    total = counts.total()
    return tuple(
        Length(many, counts[many], counts[many] / total)
        for many in range(1, max(counts, default=0) + 1)
    )


def depths(prompts: Prompts) -> tuple[DepthRate, ...]:
    """Every depth down to the deepest tree's."""
    deepest = max((int(one.tree.depths.max()) for one in _rounds(prompts)), default=0)
    done = []
    for depth in range(1, deepest + 1):
        reached = _clusters(prompts, partial(_reached, depth))
        visits = _clusters(prompts, partial(_visit, depth))
        many = int(sum(count for _, count in visits.sums))
        done.append(DepthRate(depth, share(reached), many, share(visits)))
    return tuple(done)


def ranks(prompts: Prompts) -> tuple[RankRate, ...]:
    """Every rank that some accepted node had a child of."""
    visited = [[list(_siblings(one)) for one in rounds] for rounds in prompts]
    every = [visit for rounds in visited for one in rounds for visit in one]
    accepted = sum(taken is not None for _, taken in every)
    done = []
    for rank in range(max((count for count, _ in every), default=0)):
        visits = Clusters.of(
            [
                [
                    (
                        sum(taken == rank for _, taken in one),
                        sum(count > rank for count, _ in one),
                    )
                    for one in rounds
                ]
                for rounds in visited
            ]
        )
        hits = sum(taken == rank for _, taken in every)
        count = int(sum(trials for _, trials in visits.sums))
        done.append(RankRate(rank, count, share(visits), hits / accepted if accepted else None))
    return tuple(done)


def calibration(prompts: Prompts) -> Calibration:
    """Nodes by the probability that the draft gave their path, bins without nodes left out."""
    # Per prompt, per round: (bin, predicted, accepted) of every node.
    nodes = [[list(_predictions(one)) for one in rounds] for rounds in prompts]
    every = [node for rounds in nodes for one in rounds for node in one]
    done, error = [], 0.0
    for at in range(BINS):
        inside = [(predicted, hit) for place, predicted, hit in every if place == at]
        if not inside:
            continue
        clusters = Clusters.of(
            [
                [
                    (
                        sum(hit for place, _, hit in one if place == at),
                        sum(place == at for place, _, _ in one),
                    )
                    for one in rounds
                ]
                for rounds in nodes
            ]
        )
        mean = math.fsum(predicted for predicted, _ in inside) / len(inside)
        accepted = share(clusters)
        done.append(Bin(at / BINS, (at + 1) / BINS, len(inside), mean, accepted))
        error += len(inside) * abs(mean - (accepted.value or 0.0))
    if not every:
        return Calibration((), None, None)
    bias = math.fsum(predicted - hit for _, predicted, hit in every) / len(every)
    return Calibration(tuple(done), error / len(every), bias)


def chosen(prompts: Prompts) -> tuple[Chosen, ...]:
    """How many nodes rounds verified, which an automatic budget decides."""
    counts = Counter(one.tree.rows - 1 for one in _rounds(prompts))
    return tuple(
        Chosen(many, counts[many], counts[many] / counts.total()) for many in sorted(counts)
    )


def costs(prompts: Prompts) -> tuple[Cost, ...]:
    """Verify time by rows."""
    times: dict[int, list[float]] = {}
    for one in _rounds(prompts):
        times.setdefault(one.tree.rows, []).append(1000 * one.seconds.verify)
    return tuple(Cost(rows, len(times[rows]), *_quartiles(times[rows])) for rows in sorted(times))


def per_round(prompts: Sequence[Prompts], count: Callable[[Round], float]) -> Estimate:
    """The mean over all rounds of a count, which is never below 0.

    prompts: per prompt all its repeats. They make one prompt, and not several: what the n-th rounds
    of the repeats add is taken together.
    """
    clusters = Clusters.of(
        [
            [
                (sum(count(one) for one in same if one is not None), len(same) - same.count(None))
                for same in zip_longest(*repeats)
            ]
            for repeats in prompts
        ]
    )
    return _least(0.0, pooled(clusters)) if clusters.sums else NOTHING


def _least(bound: float, of: Estimate) -> Estimate:
    """An estimate of what is never below `bound`, whose interval is not either."""
    return of if of.low is None else replace(of, low=max(bound, of.low))


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def _clusters(prompts: Prompts, of: Callable[[Round], Sums]) -> Clusters:
    return Clusters.of([[of(one) for one in rounds] for rounds in prompts])


def _rounds(prompts: Prompts) -> Iterator[Round]:
    return (one for rounds in prompts for one in rounds)


def _reached(depth: int, one: Round) -> Sums:
    return one.accepted >= depth, 1


def _visit(depth: int, one: Round) -> Sums:
    """(accepted at this depth, came to it): whether the path got there, and the tree went on."""
    if one.accepted < depth - 1:
        return 0, 0
    above = one.path[depth - 1]
    return one.accepted >= depth, bool((one.tree.parents == above).any())


def _siblings(one: Round) -> Iterator[tuple[int, int | None]]:
    """Per accepted node with children: how many, and the rank of the accepted one, if any."""
    children: dict[int, list[int]] = {}
    for row, parent in enumerate(one.tree.parents.tolist()):
        children.setdefault(parent, []).append(row)
    weights = one.tree.log_weights
    for at, row in enumerate(one.path):
        below = sorted(children.get(row, ()), key=lambda child: (-weights[child], child))
        if below:
            taken = one.path[at + 1] if at + 1 < len(one.path) else None
            yield len(below), None if taken is None else below.index(taken)


def _predictions(one: Round) -> Iterator[tuple[int, float, bool]]:
    """Per drafted node: its bin, the probability of its path, whether it was accepted."""
    accepted = set(one.path)
    for row, weight in enumerate(one.tree.log_weights.tolist()):
        if row:
            predicted = math.exp(weight)
            yield min(int(predicted * BINS), BINS - 1), predicted, row in accepted
