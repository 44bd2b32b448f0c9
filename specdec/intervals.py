"""Intervals: how far a figure may be off, at 95 % confidence.

Rounds of one prompt are correlated, so they are never counted as if each were a draw of its own.
What is taken as independent are clusters: the prompts, where there are at least `PROMPTS` of them;
with fewer, consecutive blocks of rounds, about `BLOCKS` in all (batch means: Schmeiser 1982,
"Batch size effects in the analysis of simulation output", Operations Research 30). Blocks tell how
far these prompts' figure is known and nothing about other prompts; every estimate says which it is.
Quantiles come from scipy, loaded when the first interval is asked for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

PROMPTS, BLOCKS = 6, 10
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval; low and high are None where there is too little to tell.

    unit: what was taken as independent, "prompts" or "blocks"; count: how many there were.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    unit: str = "prompts"
    count: int = 0


NOTHING = Estimate(None)


def told(one: Estimate, digits: int = 2, scale: float = 1.0) -> str:
    """A figure and its interval: "1.31 (1.22 to 1.40)"."""
    if one.value is None:
        return "-"
    text = f"{scale * one.value:.{digits}f}"
    if one.low is None or one.high is None:
        return text
    return f"{text} ({scale * one.low:.{digits}f} to {scale * one.high:.{digits}f})"


Sums = tuple[float, float]
"""A numerator and a denominator, of a round or summed over a cluster."""


@dataclass(frozen=True)
class Clusters:
    """The clusters of a group of prompts: per cluster its prompt and the sums of its rounds."""

    sums: tuple[Sums, ...]
    prompts: tuple[int, ...]
    unit: str

    @classmethod
    def of(cls, prompts: Sequence[Sequence[Sums]]) -> "Clusters":
        """prompts: per prompt, in order, what each of its rounds adds. Empty ones do not count."""
        there = [rounds for rounds in prompts if rounds]
        if len(there) >= PROMPTS:
            return cls(tuple(map(_sum, there)), tuple(range(len(there))), "prompts")
        sums: list[Sums] = []
        owners: list[int] = []
        for owner, rounds in enumerate(there):
            blocks = _blocks(rounds, math.ceil(BLOCKS / len(there)))
            sums += map(_sum, blocks)
            owners += [owner] * len(blocks)
        return cls(tuple(sums), tuple(owners), "blocks")


def pooled(clusters: Clusters) -> Estimate:
    """Numerators over denominators, rounds weighing the same. The standard error is that of a
    ratio of cluster totals (linearized: Cochran, Sampling Techniques, 1977, section 6), the
    quantile Student's with one degree of freedom less than there are clusters."""
    value, error = _ratio(clusters.sums)
    return _student(value, error, len(clusters.sums) - 1, clusters)


def per_prompt(clusters: Clusters) -> Estimate:
    """The mean over prompts of each prompt's own ratio, prompts weighing the same.

    Over prompts the standard error of a mean; over blocks that of the prompts' ratios together.
    """
    if clusters.unit == "prompts":
        return pooled(
            Clusters(
                tuple((top / bottom, 1.0) for top, bottom in clusters.sums if bottom),
                clusters.prompts,
                "prompts",
            )
        )
    parts = [
        _ratio(
            [one for one, at in zip(clusters.sums, clusters.prompts, strict=True) if at == owner]
        )
        for owner in dict.fromkeys(clusters.prompts)
    ]
    known = [(value, error) for value, error in parts if value is not None]
    if not known:
        return NOTHING
    mean = sum(value for value, _ in known) / len(known)
    errors = [error for _, error in known]
    error = None if None in errors else math.hypot(*(one or 0.0 for one in errors)) / len(known)
    return _student(mean, error, len(clusters.sums) - len(parts), clusters)


def share(clusters: Clusters) -> Estimate:
    """Hits over trials, with the interval of Korn and Graubard (Survey Methodology 24, 1998):
    Clopper and Pearson's for as many trials as the clusters are worth, never more than there were.
    """
    from scipy.special import betaincinv, stdtrit

    tried = [one for one in clusters.sums if one[1]]
    value, error = _ratio(tried)
    trials = sum(bottom for _, bottom in tried)
    freedom = len(tried) - 1
    if value is None or freedom < 1:
        return Estimate(value, unit=clusters.unit, count=len(tried))
    worth = trials
    if error and 0 < value < 1:
        tail = (1 + CONFIDENCE) / 2
        shrink = (stdtrit(max(trials - 1, 1), tail) / stdtrit(freedom, tail)) ** 2
        worth = min(trials, value * (1 - value) / error**2 * shrink)
    hits, tail = value * worth, (1 - CONFIDENCE) / 2
    low = float(betaincinv(hits, worth - hits + 1, tail)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 1, worth - hits, 1 - tail)) if hits < worth else 1.0
    return Estimate(value, low, high, clusters.unit, len(tried))


def median(values: Sequence[float]) -> Estimate:
    """The median over prompts; its interval lies between two of the values, whatever their
    distribution (the sign test's: Conover, Practical Nonparametric Statistics, section 3.2)."""
    import statistics

    if not values:
        return NOTHING
    found, count = statistics.median(values), len(values)
    at = outermost(count)
    ordered = sorted(values)
    low, high = (ordered[at], ordered[count - 1 - at]) if at is not None else (None, None)
    return Estimate(found, low, high, "prompts", count)


def outermost(count: int) -> int | None:
    """How many of `count` ordered values lie below a median's interval; None for too few."""
    from scipy.special import bdtr

    tail = (1 - CONFIDENCE) / 2
    below = [k for k in range(count // 2) if bdtr(k, count, 0.5) <= tail]
    return below[-1] if below else None


def paired(value: float, prompts: Sequence[Sequence[Sums]]) -> Estimate:
    """A ratio of two times of the same work, known to be `value`; symmetric in its logarithm.

    prompts: per prompt the times of its blocks, (numerator, denominator), pairs of the same text.
    """
    spread, freedom = [], 0
    for blocks in prompts:
        ratio, error = _ratio(blocks)
        if ratio and error is not None:
            spread.append(error / ratio)
            freedom += len(blocks) - 1
    count = sum(map(len, prompts))
    if not spread or len(spread) < len(prompts):
        return Estimate(value, unit="blocks", count=count)
    wide = math.exp(_quantile(freedom) * math.hypot(*spread) / len(spread))
    return Estimate(value, value / wide, value * wide, "blocks", count)


def difference(one: Estimate, other: Estimate) -> Estimate:
    """one - other, of independent estimates: the half-widths add like errors."""
    if one.value is None or other.value is None:
        return NOTHING
    value, unit, count = one.value - other.value, "blocks", min(one.count, other.count)
    if one.low is None or other.low is None:
        return Estimate(value, unit=unit, count=count)
    half = math.hypot(one.value - one.low, other.value - other.low)
    return Estimate(value, value - half, value + half, unit, count)


def _ratio(sums: Sequence[Sums]) -> tuple[float | None, float | None]:
    """The ratio of totals and its standard error, None where there is none to tell."""
    top, bottom = _sum(sums)
    if not bottom:
        return None, None
    value, count = top / bottom, len(sums)
    if count < 2:
        return value, None
    squares = sum((one - value * other) ** 2 for one, other in sums)
    return value, math.sqrt(squares * count / (count - 1)) / bottom


def _student(value: float | None, error: float | None, freedom: int, of: Clusters) -> Estimate:
    count = len(of.sums)
    if value is None or error is None or freedom < 1:
        return Estimate(value, unit=of.unit, count=count)
    half = _quantile(freedom) * error
    return Estimate(value, value - half, value + half, of.unit, count)


def _quantile(freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def _sum(sums: Sequence[Sums]) -> Sums:
    return math.fsum(one for one, _ in sums), math.fsum(one for _, one in sums)


def _blocks(rounds: Sequence[Sums], most: int) -> list[Sequence[Sums]]:
    """Consecutive parts of nearly equal length, of two rounds at least."""
    count = max(1, min(most, len(rounds) // 2))
    edges = [len(rounds) * at // count for at in range(count + 1)]
    return [rounds[a:b] for a, b in pairwise(edges)]
