"""One measured run of a rig, and medians of several."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from scripts.streaming.rig import Rig
from scripts.streaming.trace import Trace
from specdec.budget import Budget

PROMPT = 8  # tokens of the trace that are prefilled
SETTLE = 2  # rounds before the clock starts


@dataclass(frozen=True)
class Run:
    """Figures of one run; times in seconds, all without the prompt and the first rounds."""

    tokens: int
    rounds: int
    seconds: float
    bytes_read: int
    read_seconds: float
    stall_seconds: float
    hits: int
    misses: int

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Summary:
    """Runs of one setting together; per committed token unless said otherwise.

    bandwidth: bytes per second while a read is under way, 0 where nothing is read.
    rate_share: rate by that of the setting it is compared to.
    """

    rate: float
    seconds: float
    bytes: float
    stall_seconds: float
    bandwidth: float
    hit_rate: float
    acceptance: float
    rate_share: float


def measure(
    rig: Rig,
    trace: Trace,
    first: int,
    budget: Budget,
    tokens: int,
    drafting: bool = False,
    settle: int = SETTLE,
) -> Run:
    """Decode at least `tokens` tokens of the trace after its position `first`, slots warm, after
    `settle` rounds that do not count. drafting: whether the budget may ask for more than 1."""
    rig.warm(trace, first)
    rig.play(trace, first, PROMPT, drafting)
    for _ in range(settle):
        rig.engine.step(budget)
    rig.cache.reset_counters()
    done = rounds = 0
    start = perf_counter()
    while done < tokens:
        done += len(rig.engine.step(budget).tokens)
        rounds += 1
    seconds = perf_counter() - start
    reads, layers = rig.cache.reads(), rig.cache.counters()
    hits, misses = rig.cache.slot_requests()
    return Run(
        done,
        rounds,
        seconds,
        reads.bytes,
        reads.seconds,
        sum(one.stall_seconds for one in layers),
        hits,
        misses,
    )


def summary(runs: Sequence[Run], against: Sequence[Run]) -> Summary:
    """Of the repeats, and of their ratios to another setting's. Seconds of a round are medians;
    what does not depend on the machine (tokens a round, bytes, hits) is taken over all repeats
    together, or a few lucky rounds would decide."""

    def total(name: str) -> float:
        return sum(getattr(one, name) for one in runs)

    def a_round(one: Run) -> float:
        return one.seconds / one.rounds

    tokens = total("tokens")
    acceptance = tokens / total("rounds")
    seconds = statistics.median(map(a_round, runs)) / acceptance
    shares = [a_round(b) / a_round(a) for a, b in zip(runs, against, strict=True)]
    base = sum(one.tokens for one in against) / sum(one.rounds for one in against)
    return Summary(
        rate=1 / seconds,
        seconds=seconds,
        bytes=total("bytes_read") / tokens,
        stall_seconds=statistics.median(one.stall_seconds / one.tokens for one in runs),
        bandwidth=statistics.median(
            one.bytes_read / one.read_seconds if one.bytes_read else 0.0 for one in runs
        ),
        hit_rate=total("hits") / max(1, total("hits") + total("misses")),
        acceptance=acceptance,
        rate_share=statistics.median(shares) * acceptance / base,
    )
