"""Trial: which way of prefetching is fastest, found out while a run goes on.

Where passes hardly wait for reads nothing is tried. Else all ways, none among them, take turns of a
few passes; those that are much slower than none leave the trial at once. Then the best goes on
until it is time to try again. A way other than none must win clearly. What is compared is the wall
time of passes per request of an expert, by medians: waiting for reads, deciding what to prefetch,
and what either costs everything else.
"""

from collections.abc import Sequence
from statistics import median

OFF = "off"
WINDOW = 8  # passes of a turn
SETTLING = 2  # of them that are not counted: what the turn before began may still help or hinder
TURNS = 3  # of each way
WAITING = 0.1  # of the time must be waiting for reads, or there is nothing to gain
HOPELESS = 1.25  # times as slow as none: no further turn
GAIN = 0.05  # by which a way must be faster than none
PASSES = 256  # until the next trial; twice as many each time that the verdict stays, up to
MOST_PASSES = 4096


class Trial:
    """`way` is the one whose turn it is."""

    def __init__(self, ways: Sequence[str]) -> None:
        """ways: beside "off"."""
        assert OFF not in ways
        self._ways: tuple[str, ...] = (OFF, *ways)
        self._verdict, self._interval = "", PASSES
        self._passes = 0  # in all
        self._seconds, self._stall = 0.0, 0.0  # of a turn of none, and of it waiting
        self._rest = 0  # passes until the next trial
        self.words: list[str] = []  # verdicts so far
        self._begin()

    @property
    def way(self) -> str:
        return self._verdict if self._rest else self._turns[0]

    def passed(self, seconds: float, stall: float, requests: int) -> None:
        """A pass took so long, so much of it waiting for reads, for so many requests of unpinned
        layers."""
        self._passes += 1
        if self._rest:
            self._rest -= 1
            if not self._rest:
                self._begin()
            return
        self._turn += 1
        if self._turn > SETTLING and requests:
            self._costs[self.way].append(seconds / requests)
            self._seconds, self._stall = self._seconds + seconds, self._stall + stall
        if self._turn == WINDOW:
            self._next()

    def _begin(self) -> None:
        self._turns = list(self._ways) * TURNS
        self._costs: dict[str, list[float]] = {way: [] for way in self._ways}
        self._turn, self._seconds, self._stall = 0, 0.0, 0.0

    def _next(self) -> None:
        """A turn is over."""
        way, self._turn = self._turns.pop(0), 0
        if not self._costs[OFF]:
            self._decide(OFF, "no request of an expert")
        elif way == OFF and self._stall < WAITING * self._seconds:
            share = 100 * self._stall / self._seconds
            self._decide(OFF, f"{share:.0f} % of the time is waiting for reads")
        elif self._costs[way] and self._cost(way) > HOPELESS * self._cost(OFF):
            self._turns = [one for one in self._turns if one != way]
        if not self._rest and not set(self._turns) - {OFF}:
            costs = {one: self._cost(one) for one in self._ways if self._costs[one]}
            best = min(costs, key=costs.__getitem__)
            best = OFF if costs[best] > (1 - GAIN) * costs[OFF] else best
            told = ", ".join(f"{one} {1e6 * cost:.0f}" for one, cost in costs.items())
            self._decide(best, f"microseconds per request: {told}")
        if not self._rest and way == OFF:
            self._seconds, self._stall = 0.0, 0.0

    def _cost(self, way: str) -> float:
        return median(self._costs[way])

    def _decide(self, way: str, why: str) -> None:
        verb = "off" if way == OFF else f"by {way}"
        self.words.append(f"{verb} after {self._passes} passes ({why})")
        again = way == self._verdict
        self._interval = min(2 * self._interval, MOST_PASSES) if again else PASSES
        self._verdict, self._rest = way, self._interval
