"""Stops: where a text ends because one of the stop strings appeared in it."""

from collections.abc import Sequence


class StopScanner:
    """Passes text through up to the first stop string.

    Text that could still turn out to be the beginning of a stop string is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string would end every text"
        self.stops = tuple(stops)
        self.found = False
        self._held = ""

    def add(self, text: str) -> str:
        """What may be shown now; `found` is set when a stop string is complete."""
        if self.found:
            return ""
        self._held += text
        ends = [at for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            shown, self._held = self._held[: min(ends)], ""
            return shown
        keep = max((self._overlap(stop) for stop in self.stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """What was held back, when the text ends for another reason."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
