"""Many runs in one line: the figures of a class of prompts, which a bench reports.

What the figures of a single run mean stands in specdec.metrics.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from specdec import intervals
from specdec.metrics import Metrics


@dataclass(frozen=True)
class Aggregate:
    """Figures of one class of prompts at one budget, every prompt weighing the same.

    decode_tokens_per_second, prefill_tokens_per_second, seconds_to_first_token: median over
        prompts of the median over repeats.
    speedup: median over prompts of this budget's median decode tokens/s over that of budget 1;
        None when budget 1 was not run. speedup_low, speedup_high: its interval at 95 % confidence
        (intervals.median); None for fewer than six prompts.
    acceptance_length, bytes_per_token, effective_hit_rate: mean over prompts of the per-prompt
        mean (for the first: "average acceptance length" of the DFlash papers).
    prompts: those that were run, which in a partial sweep may be fewer than there are.
    depths: rounds of all prompts together that accepted at least k draft tokens, k = 1, 2, ...
    """

    prompts: int
    decode_tokens_per_second: float | None
    prefill_tokens_per_second: float | None
    seconds_to_first_token: float | None
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    acceptance_length: float | None
    depths: tuple[float, ...]
    bytes_per_token: float | None
    effective_hit_rate: float | None


def aggregate(
    prompts: Sequence[Sequence[Metrics]], plain: Sequence[Sequence[Metrics]] | None
) -> Aggregate:
    """`prompts`: per prompt its repeats at one budget; `plain`: the same at budget 1, if run."""
    speeds = [median([one.decode_tokens_per_second for one in runs]) for runs in prompts]
    speedups: list[float | None] = []
    if plain is not None:
        for runs, speed in zip(plain, speeds, strict=True):
            base = median([one.decode_tokens_per_second for one in runs])
            speedups.append(speed / base if speed is not None and base else None)
    runs = [one for repeats in prompts for one in repeats]
    gain = intervals.median([one for one in speedups if one is not None])
    rounds = sum(one.rounds for one in runs)
    deepest = max((len(one.depths) for one in runs), default=0)
    return Aggregate(
        prompts=sum(1 for repeats in prompts if repeats),
        decode_tokens_per_second=median(speeds),
        prefill_tokens_per_second=median(
            [median([one.prefill_tokens_per_second for one in runs]) for runs in prompts]
        ),
        seconds_to_first_token=median(
            [median([one.seconds_to_first_token for one in runs]) for runs in prompts]
        ),
        speedup=gain.value,
        speedup_low=gain.low,
        speedup_high=gain.high,
        acceptance_length=_mean(
            [_mean([one.acceptance_length for one in repeats]) for repeats in prompts]
        ),
        depths=tuple(
            sum(one.rounds * one.depths[k].reached for one in runs if k < len(one.depths)) / rounds
            for k in range(deepest)
        ),
        bytes_per_token=_mean(
            [_mean([one.experts.bytes_per_token for one in repeats]) for repeats in prompts]
        ),
        effective_hit_rate=_mean(
            [_mean([one.experts.effective_hit_rate for one in repeats]) for repeats in prompts]
        ),
    )


def median(values: Sequence[float | None]) -> float | None:
    """The median of the values that exist."""
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None
