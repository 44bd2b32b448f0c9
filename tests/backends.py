"""The two executors, for tests that hold both to the same thing."""

import importlib.util
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from specdec.kernels.array import Backend, to_numpy
from specdec.kernels.experts import ExpertWeights
from specdec.kernels.weight import Weight

REFERENCE = Backend("reference", mx.float32, "a test asked for it")
CPU = Backend("cpu", mx.float32, "a test asked for it")

_NO_NUMBA = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="the cpu executor needs numba"
)
NOT_EXACT = pytest.mark.skipif(
    mx.default_device() == mx.gpu, reason="MLX's own operations are row-invariant on its CPU alone"
)

needs_numba = _NO_NUMBA
each_backend = pytest.mark.parametrize(
    "backend",
    [pytest.param(REFERENCE, id="reference"), pytest.param(CPU, id="cpu", marks=_NO_NUMBA)],
)
# for equality to the bit between a row alone and a row in company
each_exact_backend = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(REFERENCE, id="reference", marks=NOT_EXACT),
        pytest.param(CPU, id="cpu", marks=_NO_NUMBA),
    ],
)


class Operations:
    """Calls operations with NumPy arrays on one backend, and gives NumPy arrays back.

    What stands for a count, an index or a layout goes in `keep`: positions of arguments that are
    handed over as they are.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __call__(self, operation: Callable[..., Any], *arguments: Any, keep: tuple = ()) -> Any:
        placed = [
            value if place in keep else self.place(value) for place, value in enumerate(arguments)
        ]
        return fetch(operation(*placed))

    def place(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return self.backend.place(mx.array(np.ascontiguousarray(value)))
        if isinstance(value, Weight | ExpertWeights):
            return value.on(self.backend)
        return value


def fetch(value: Any) -> Any:
    """The values on the host, of an array or of a tuple or list of them."""
    if isinstance(value, tuple | list):
        return type(value)(fetch(item) for item in value)
    return to_numpy(value) if isinstance(value, mx.array | np.ndarray) else value


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal dtype, shape and bits; tells -0 from 0, and NaN equals itself."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
