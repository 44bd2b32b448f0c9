"""Interrupts: Ctrl-C takes effect between rounds, not in the middle of one.

A KeyboardInterrupt may rise between any two instructions: inside a commit, or inside a compiler
callback, which turns it into another error. So while a text is generated the first Ctrl-C is only
noted, and `check` raises it where nothing is half done. The second one rises at once. What nobody
checked goes to the handler from before when the context ends, another Interrupts for instance.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class Interrupts:
    """A context in which Ctrl-C waits for `check`.

    Changes nothing outside the main thread, and where Ctrl-C is ignored.
    """

    def __init__(self) -> None:
        self._noted = False

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()
        # Ignored, or handled by something that is not Python: not ours to change.
        before = signal.getsignal(signal.SIGINT)
        self._before = before if main and callable(before) else None
        if self._before is not None:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            if self._noted and error is None:
                self._before(signal.SIGINT, None)

    def check(self) -> None:
        """Raise the KeyboardInterrupt that was noted, if one was; once."""
        if self._noted:
            self._noted = False
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted:
            raise KeyboardInterrupt
        self._noted = True
