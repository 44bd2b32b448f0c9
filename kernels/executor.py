"""Executor: who computes an operation.

NumPy arrays are computed by the Numba kernels of kernels/cpu. MLX arrays are computed by the
operation's reference, plain MLX operations, unless the kernels of kernels/gpu are switched on: a
setting of the process, as MLX's default device is.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np

from specdec.kernels.gpu.limits import MAX_ROWS, Unsupported, refused
from specdec.kernels.weight import Weight

P = ParamSpec("P")
R = TypeVar("R")


class _Executor:
    gpu_kernels = False


_executor = _Executor()


def use_gpu_kernels(on: bool) -> None:
    """Whether MLX arrays are computed by the kernels of kernels/gpu from now on."""
    _executor.gpu_kernels = on


def uses_gpu_kernels() -> bool:
    """Whether they do."""
    return _executor.gpu_kernels


def use_threads(count: int) -> None:
    """How many threads compute the kernels of kernels/cpu from now on; no bit depends on it."""
    importlib.import_module("specdec.kernels.cpu.team").TEAM.resize(count)


def threads() -> int:
    """How many threads do so, the caller's among them."""
    team = sys.modules.get("specdec.kernels.cpu.team")
    return 1 if team is None else int(team.TEAM.threads)


@contextmanager
def gpu_kernels(on: bool = True) -> Iterator[None]:
    """`use_gpu_kernels` for a while."""
    before = _executor.gpu_kernels
    use_gpu_kernels(on)
    try:
        yield
    finally:
        use_gpu_kernels(before)


def operation(
    kernel: Literal["always", "few rows", "never"] = "always", decides: int = 0
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a reference the operation: calls go to the function of its name in the module of its
    name in kernels/cpu or kernels/gpu, or to the reference itself.

    kernel: when kernels/gpu has one; "few rows" if the first argument has a row for each token and
        may have more than MAX_ROWS, "never" for what only prompts ask.
    decides: the argument whose (first) array says where.
    """

    def decorate(reference: Callable[P, R]) -> Callable[P, R]:
        return update_wrapper(_Operation(reference, kernel, decides), reference)

    return decorate


class _Operation:
    def __init__(self, reference: Callable[..., Any], kernel: str, decides: int) -> None:
        self.reference, self.decides = reference, decides
        self.kernel, self.few = kernel != "never", kernel == "few rows"
        self._module = reference.__module__.rpartition(".")[2]
        self._found: dict[str, Callable[..., Any]] = {}

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        array = arguments[self.decides]
        while isinstance(array, tuple | list):
            array = array[0]
        if isinstance(array, Weight):
            array = array.data
        if isinstance(array, np.ndarray):
            return self._on("cpu")(*arguments, **named)
        wanted = self.kernel and _executor.gpu_kernels
        if not wanted or (self.few and _rows(arguments[0]) > MAX_ROWS):
            return self.reference(*arguments, **named)
        try:
            return self._on("gpu")(*arguments, **named)
        except Unsupported as why:
            self._say(str(why))
            return self.reference(*arguments, **named)

    def _on(self, room: str) -> Callable[..., Any]:
        """The room's function, imported at its first call: machines with a GPU need no Numba."""
        if room not in self._found:
            module = importlib.import_module(f"specdec.kernels.{room}.{self._module}")
            name = self.reference.__name__
            # Of some operations the reference is written for either kind of array.
            missing = (self.reference,) if room == "cpu" else ()
            self._found[room] = getattr(module, name, *missing)
        return self._found[room]

    def _say(self, why: str) -> None:
        if why not in refused:
            refused[why] = None
            print(f"{why}; plain MLX operations compute it, slower and not exact", file=sys.stderr)


def _rows(x: Any) -> int:
    return len(x[0] if isinstance(x, tuple) else x)
