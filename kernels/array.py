"""Array: what the operations work on, and where.

An operation in kernels/ computes where its arrays live: MLX arrays on MLX's device, NumPy arrays
with the Numba kernels of kernels/cpu (see executor.py). Loading decides once, by `choose_backend`;
nothing is moved later.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from specdec.checkpoint import Checkpoint
from specdec.errors import SpecdecError
from specdec.kernels.gpu.limits import refused
from specdec.kernels.gpu.resident import moved
from specdec.kernels.gpu.tiles import tiles_on

# mx.array or np.ndarray; one model's arrays are all of one kind
Array: TypeAlias = Any

BACKENDS = ("metal", "cuda", "cpu", "reference")


@dataclass(frozen=True)
class Backend:
    """Where a model's arrays live.

    name: "metal" or "cuda" (the kernels of kernels/gpu), "cpu" (NumPy and Numba) or "reference"
        (plain MLX on MLX's default device).
    dtype: of activations and of everything that is not packed.
    why: how it came to be chosen, in words.
    """

    name: str
    dtype: mx.Dtype
    why: str

    def __post_init__(self) -> None:
        assert self.name in BACKENDS
        assert self.name != "cpu" or self.dtype == mx.float32

    @property
    def exact(self) -> bool:
        """Whether a row's bits are known not to depend on the rows computed with it.

        The kernels are made so. MLX's own operations are on a CPU; on a GPU they take other matrix
        kernels for one row than for several.
        """
        if self.name == "reference":
            return mx.default_device() == mx.cpu
        return self.name == "cpu" or not refused

    @property
    def on_gpu(self) -> bool:
        """Whether the kernels of kernels/gpu compute."""
        return self.name in ("metal", "cuda")

    def place(self, array: mx.array) -> Array:
        """The array as this backend holds it; shares memory where it can."""
        return np.array(array, copy=False) if self.name == "cpu" else array

    def load(
        self,
        checkpoint: Checkpoint,
        name: str,
        shape: tuple[int, ...] | None = None,
        dtype: mx.Dtype | None = None,
    ) -> Array:
        """Read a tensor; floats become `dtype` or the backend's."""
        array = checkpoint.load(name, shape, dtype or self.dtype)
        if self.name == "cuda" and array.size:
            array = moved(array)  # or each row would wait for its page when it is first read
        return self.place(array)

    def zeros(self, shape: Sequence[int], dtype: mx.Dtype | None = None) -> Array:
        if self.name == "cpu":
            return np.zeros(shape, np.float32)
        return mx.zeros(shape, dtype or self.dtype)

    def index(self, values: Sequence[int] | np.ndarray) -> Array:
        """Indexes for `array[index]`."""
        return np.asarray(values) if self.name == "cpu" else mx.array(np.asarray(values))


def choose_backend(dtype: mx.Dtype = mx.bfloat16, kernels: str | None = None) -> Backend:
    """The backend for this machine. `kernels`, or else SPECDEC_KERNELS, forces one by its name;
    SpecdecError if it cannot be had.

    dtype: of the checkpoint's floats, used on a GPU; on a CPU activations are float32, where
        anything shorter is emulated and many times slower.
    """
    on_gpu = mx.default_device() == mx.gpu
    has_numba = importlib.util.find_spec("numba") is not None
    setting, forced = "--kernels", kernels
    if forced is None:
        setting, forced = "SPECDEC_KERNELS", os.environ.get("SPECDEC_KERNELS")
    if forced is not None:
        if forced not in BACKENDS:
            raise SpecdecError(f"{setting} = {forced!r}, expected one of {', '.join(BACKENDS)}")
        if forced == "cpu" and not has_numba:
            raise SpecdecError(f"{setting} = 'cpu' needs numba: pip install 'specdec[cpu]'")
        if forced in ("metal", "cuda") and not (on_gpu and _has(forced)):
            raise SpecdecError(f"{setting} = {forced!r}: MLX has no such GPU here")
        name, why = forced, f"forced by {setting}"
    elif on_gpu:
        name, why = "metal" if _has("metal") else "cuda", "MLX's GPU device"
    elif has_numba:
        name, why = "cpu", "no GPU device; numba is installed"
    else:
        name, why = "reference", "no GPU device, and numba is not installed (pip install numba)"
    if name == "cpu" or not on_gpu:
        return Backend(name, mx.float32, why)
    if name != "reference" and dtype != mx.float32:
        why += ", with matrix units" if tiles_on() else ", without matrix units"
    # float16 ends at 65504, which residual streams exceed
    return Backend(name, mx.float32 if dtype == mx.float32 else mx.bfloat16, why)


def _has(platform: str) -> bool:
    return bool(mx.metal.is_available() if platform == "metal" else mx.cuda.is_available())


class OnCpu:
    """A module of kernels/cpu, imported when its first operation runs.

    Machines with a GPU need no Numba, and importing it takes a third of a second.
    """

    def __init__(self, name: str) -> None:
        self._module = f"specdec.kernels.cpu.{name}"

    def __getattr__(self, operation: str) -> Any:
        found = getattr(importlib.import_module(self._module), operation)
        setattr(self, operation, found)  # the next look-up does not come here
        return found


def is_numpy(x: Array) -> bool:
    return isinstance(x, np.ndarray)


def to_numpy(x: Array) -> np.ndarray:
    """The values on the host, evaluated; bfloat16 becomes float32."""
    if isinstance(x, np.ndarray):
        return x
    _wait_for_compiler()
    return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)


def concatenate(arrays: Sequence[Array], axis: int = 0) -> Array:
    if len(arrays) == 1:
        return arrays[0]
    return (np if is_numpy(arrays[0]) else mx).concatenate(arrays, axis=axis)


def contiguous(x: Array) -> Array:
    """x laid out row by row, in memory of its own size."""
    return np.array(x, order="C") if is_numpy(x) else mx.contiguous(x)


def evaluate(*arrays: Array) -> None:
    """Wait for MLX arrays; NumPy arrays are there already."""
    _wait_for_compiler()
    mx.eval([array for array in arrays if not is_numpy(array)])


def start(*arrays: Array) -> None:
    """Let MLX begin to compute these; NumPy arrays are there already."""
    _wait_for_compiler()
    mx.async_eval([array for array in arrays if not is_numpy(array)])


def _wait_for_compiler() -> None:
    """Until all kernels are there that are about to run; no kernel, nothing to wait for."""
    kept = sys.modules.get("specdec.kernels.gpu.kept")
    if kept is not None:
        kept.wait()


def finite_rows(x: Array) -> Array:
    """bool [rows]: which rows of x [rows, n] have no NaN and no Inf."""
    return (np if is_numpy(x) else mx).isfinite(x).all(axis=-1)
