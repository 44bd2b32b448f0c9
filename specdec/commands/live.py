"""LiveLine: how a run is going, on one line of a terminal, redrawn as text comes."""

from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from specdec.commands.console import Console
from specdec.units import percent, size

if TYPE_CHECKING:
    from specdec.target.read_queue import ReadCounters


class Traffic(Protocol):
    """As much of an ExpertCache as is told."""

    def slot_requests(self) -> tuple[int, int]: ...

    def foreseen(self) -> int: ...

    def reads(self) -> "ReadCounters": ...


class LiveLine:
    """Tokens, speed, hit rate of the slots and bytes read. Silent where stderr is no terminal,
    with --quiet, and where what is `shown` runs over the same terminal."""

    def __init__(
        self, console: Console, cache: Traffic, label: str, total: int, shown: bool
    ) -> None:
        self._line = None if shown else console.line()
        self._cache, self._label, self._total = cache, label, total
        self._pieces, self._start = 0, 0.0

    def text(self) -> None:
        """A piece of text came, about a token."""
        self._pieces += 1
        if self._pieces == 1:
            self._start = perf_counter()
        if self._line is not None:
            self._line(self._words, self._pieces >= self._total)

    def end(self) -> None:
        """The run is over: leave the line as it is, and begin a new one."""
        if self._line is not None and 0 < self._pieces < self._total:
            self._line(self._words, True)

    def _words(self) -> str:
        seconds = perf_counter() - self._start
        speed = f"{(self._pieces - 1) / seconds:.1f}" if self._pieces > 1 and seconds else "-"
        hits, misses = self._cache.slot_requests()
        rate = hits / (hits + misses) if hits + misses else None
        early = self._cache.foreseen()
        foreseen = f", {percent(early / (early + misses))} of misses foreseen" if early else ""
        return (
            f"{self._label} {min(self._pieces, self._total)}/{self._total} tokens, {speed} tok/s, "
            f"slots {percent(rate)} hit, {size(self._cache.reads().bytes)} read{foreseen}"
        )
