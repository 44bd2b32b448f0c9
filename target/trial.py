"""Trial: which way of prefetching waits least for reads, found out while a run goes on.

All ways, none among them, take turns of a few passes each; then the best goes on until it is time
to try again. A way other than none must win clearly. What is compared is the time that a request
of an expert costs: waiting for reads, and deciding what to prefetch.
"""

from collections.abc import Sequence

OFF = "off"
WINDOW = 8  # passes of a turn
SETTLING = 2  # of them that are not counted: what the turn before began may still help or hinder
TURNS = 3  # of each way
GAIN = 0.05  # by which a way must be better than none
PASSES = 256  # until the next trial; twice as many each time that the verdict stays, up to
MOST_PASSES = 4096


class Trial:
    """One way after the other; `way` is the one whose turn it is."""

    def __init__(self, ways: Sequence[str]) -> None:
        """ways: beside "off"."""
        assert OFF not in ways
        self._ways = (OFF, *ways)
        self._interval = PASSES
        self._verdict: str | None = None
        self.words: list[str] = []  # verdicts so far
        self._passes = 0  # in all
        self._left: int | None = None  # passes until the next trial
        self._begin()

    @property
    def trying(self) -> bool:
        return self._left is None

    @property
    def way(self) -> str:
        if self._verdict is not None and not self.trying:
            return self._verdict
        return self._ways[self._tried // WINDOW % len(self._ways)]

    def passed(self, seconds: float, requests: int) -> None:
        """A pass waited and decided for so long, for so many requests of unpinned layers."""
        self._passes += 1
        if self._left is not None:
            self._left -= 1
            if self._left <= 0:
                self._begin()
            return
        if self._tried % WINDOW >= SETTLING:
            self._seconds[self.way] += seconds
            self._requests[self.way] += requests
        self._tried += 1
        if self._tried == WINDOW * TURNS * len(self._ways):
            self._decide()

    def _begin(self) -> None:
        self._tried, self._left = 0, None
        self._seconds = dict.fromkeys(self._ways, 0.0)
        self._requests = dict.fromkeys(self._ways, 0)

    def _decide(self) -> None:
        costs = {way: self._seconds[way] / max(1, self._requests[way]) for way in self._ways}
        best = min(costs, key=costs.__getitem__)
        if costs[best] > (1 - GAIN) * costs[OFF]:
            best = OFF
        told = ", ".join(f"{way} {1e6 * cost:.1f}" for way, cost in costs.items())
        verb = "switched off" if best == OFF else f"{best} goes on"
        self.words.append(f"after {self._passes} passes {verb} (us per request: {told})")
        self._interval = min(2 * self._interval, MOST_PASSES) if best == self._verdict else PASSES
        self._verdict, self._left = best, self._interval
