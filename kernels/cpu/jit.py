"""How this room compiles: Numba's njit with one set of options, cached on disk.

fastmath lets sums run in vector lanes. The lanes are fixed when a kernel is compiled and depend on
the length of a row alone, so a row's bits do not depend on the other rows. NaN and Inf keep their
meaning (no nnan, no ninf): the engine looks for them.

The first run on a machine compiles for some seconds, and says so on stderr.
"""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import extending, njit, types
from numba.core import event

# An operation spelt out in LLVM instructions; called without the first argument of its definition.
intrinsic: Any = extending.intrinsic

FAST = {"reassoc", "contract", "nsz", "arcp"}
_SOURCES = hashlib.sha256(
    b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()[:12]


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a kernel at its first call and keep it on disk, where there is a place for it."""
    try:
        return _compiled(function, cache=True)
    except RuntimeError:  # neither the package nor the user's cache folder may be written
        return _compiled(function, cache=False)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """A part of kernels that is compiled as if it stood in them, and never by itself."""
    return _compiled(function, cache=False, inline="always")


def entry(kernel: Any, words: int) -> int:
    """The address of a kernel's code that takes so many int64, by C's rules; compiled now."""
    signature = (types.int64,) * words
    kernel.compile(signature)
    made = kernel.overloads[signature]
    return int(made.library.get_pointer_to_function(made.fndesc.llvm_cfunc_wrapper_name))


def _compiled(
    function: Callable[..., Any], cache: bool, inline: str = "never"
) -> Callable[..., Any]:
    # Numba keeps a kernel under its name and looks for changes in its own file only; a kernel is
    # made of the others too, of the dot products above all.
    function.__qualname__ += f"_{_SOURCES}"
    options: dict[str, Any] = {
        "fastmath": FAST,
        "nogil": True,
        "error_model": "numpy",
        "inline": inline,
    }
    return njit(function, cache=cache, **options)


class _Announcement(event.Listener):
    """Says once that kernels are being compiled; a kernel read from the cache is no compilation."""

    def on_start(self, event: event.Event) -> None:
        kernel = event.data["dispatcher"].py_func.__module__
        if kernel.startswith("specdec.") and self._first:
            self._first = False
            kept = event.data["dispatcher"].stats.cache_path is not None
            often = "once for this installation" if kept else "at every start: set NUMBA_CACHE_DIR"
            print(f"compiling CPU kernels, {often} ...", file=sys.stderr)

    def on_end(self, event: event.Event) -> None: ...

    _first = True


event.register("numba:compile", _Announcement())
