"""Interrupts: Ctrl-C takes effect between rounds, not in the middle of one.

A KeyboardInterrupt may rise between any two instructions: inside a commit, or inside a compiler
callback, which turns it into another error. So while a text is generated the first Ctrl-C is only
noted, and `check` raises it where nothing is half done. The second one rises at once.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class Interrupts:
    """A context in which Ctrl-C waits for `check`. Outside the main thread it changes nothing."""

    def __init__(self) -> None:
        self._noted = False

    def __enter__(self) -> Self:
        self._here = threading.current_thread() is threading.main_thread()
        if self._here:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._here:
            signal.signal(signal.SIGINT, self._before)

    def check(self) -> None:
        """Raise the KeyboardInterrupt that was noted, if one was."""
        if self._noted:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted:
            raise KeyboardInterrupt
        self._noted = True
