"""How this room compiles: Numba's njit with one set of options, cached on disk.

fastmath lets sums run in vector lanes. The lanes are fixed when a kernel is compiled and depend on
the length of a row alone, so a row's bits do not depend on the other rows. NaN and Inf keep their
meaning (no nnan, no ninf): the engine looks for them.

The first run on a machine compiles for some seconds, and says so on stderr.
"""

import sys

from numba import njit
from numba.core import event

FAST = {"reassoc", "contract", "nsz", "arcp"}

jit = njit(fastmath=FAST, nogil=True, error_model="numpy", cache=True)


class _Announcement(event.Listener):
    """Says once that kernels are being compiled; a kernel read from the cache is no compilation."""

    def on_start(self, event: event.Event) -> None:
        kernel = event.data["dispatcher"].py_func.__module__
        if kernel.startswith("specdec.") and self._first:
            self._first = False
            print("compiling CPU kernels, once for this installation ...", file=sys.stderr)

    def on_end(self, event: event.Event) -> None: ...

    _first = True


event.register("numba:compile", _Announcement())
