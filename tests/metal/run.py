"""Run: a kernel's MSL on the CPU, over NumPy or MLX arrays."""

import ctypes
import functools
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from typing import Any, Literal, TypeAlias

import mlx.core as mx
import numpy as np
import pytest

from specdec.kernels.gpu.kernel import Launch, MetalKernel, Template, Threads
from tests.metal.build import Sanitize, built
from tests.metal.capture import source_for
from tests.metal.msl import Msl

Order: TypeAlias = Literal["forward", "reverse"]

# what a sanitizer found
FOUND = re.compile(
    r"(ERROR: AddressSanitizer: .*|WARNING: ThreadSanitizer: .*|kernel\.metal:.*runtime error.*)"
)
QUIET = {
    "ASAN_OPTIONS": "detect_leaks=0:color=never",
    "UBSAN_OPTIONS": "print_stacktrace=0:color=never",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:color=never:report_thread_leaks=0",
}


class KernelFault(Exception):
    """What the shim or a sanitizer found wrong with a kernel, in words."""


def run_msl(
    kernel: MetalKernel | Callable[..., Any] | str,
    inputs: Sequence[mx.array | np.ndarray | int | float],
    output_shapes: Sequence[tuple[int, ...]],
    output_dtypes: Sequence[mx.Dtype],
    grid: Threads,
    threadgroup: Threads,
    template: Template | None = None,
    init_value: float | None = None,
    order: Order = "forward",
    sanitize: Sanitize = None,
) -> list[np.ndarray]:
    """The outputs of one launch; bfloat16 ones as float32, which holds the same values. Inputs that
    a MetalKernel writes into hold what it wrote afterwards.

    kernel: a MetalKernel, what mx.fast.metal_kernel returned, or the text MLX would compile.
    order: of threads, simdgroups and threadgroups between two meetings.
    sanitize: "memory" finds accesses out of bounds and undefined behaviour, "races" accesses that
        no barrier orders, within a threadgroup and between them.
    Without init_value outputs begin as NaN (all bits set), as does threadgroup memory.
    KernelFault says what is wrong with the kernel.
    """
    arrays = [mx.contiguous(mx.array(x)) for x in inputs]
    mx.eval(arrays)
    if isinstance(kernel, str):
        text = kernel
    else:
        launch = (output_shapes, output_dtypes, grid, threadgroup, template)
        text = _source(kernel, arrays, *launch)
    msl = _parsed(text)
    outputs = [
        _initial(s, d, init_value) for s, d in zip(output_shapes, output_dtypes, strict=True)
    ]
    message = [np.array([*grid, *threadgroup], np.uint32).tobytes()]
    for data in _buffers(msl, arrays, outputs):
        message += [len(data).to_bytes(8, "little"), data]
    writes = _written(kernel, inputs) if isinstance(kernel, MetalKernel) else {}
    command = [str(built(_program(msl, tuple(writes)), sanitize)), order]
    done = _executed(command, b"".join(message))
    if b"unexpected memory mapping" in done.stderr:
        # the race detector does not bear every randomization of addresses
        done = _executed(["setarch", "-R", *command], b"".join(message))
    if done.returncode != 0:
        raise KernelFault(_words(done.returncode, done.stderr.decode(errors="replace"), text))
    results, at = [], 0
    for array, before in writes.values():
        new = done.stdout[at : at + array.nbytes]
        at += array.nbytes
        if new != before:  # an array may be several inputs, and be changed as one of them
            _put(array, new)
    for output, dtype in zip(outputs, output_dtypes, strict=True):
        raw = np.frombuffer(done.stdout, output.dtype, output.size, at).reshape(output.shape)
        at += output.nbytes
        results.append(_widened(raw) if dtype == mx.bfloat16 else raw.copy())
    assert at == len(done.stdout)
    return results


_texts: dict[tuple[object, ...], str] = {}
_parsed = functools.cache(Msl.parse)


@functools.cache
def _program(msl: Msl, written: tuple[str, ...]) -> str:
    return msl.program(written)


def _source(
    kernel: MetalKernel | Callable[..., Any],
    arrays: list[mx.array],
    output_shapes: Sequence[tuple[int, ...]],
    output_dtypes: Sequence[mx.Dtype],
    grid: Threads,
    threadgroup: Threads,
    template: Template | None,
) -> str:
    """As source_for, asked once for all launches that are alike: of the product's own kernels, for
    tests write others anew."""
    launch = (output_shapes, output_dtypes, grid, threadgroup, template)
    if not isinstance(kernel, MetalKernel) or kernel.folder != files("specdec.kernels.gpu"):
        return source_for(kernel, arrays, *launch)
    key = (
        kernel,
        *((array.shape, array.dtype) for array in arrays),
        *(*map(tuple, output_shapes), *output_dtypes, tuple(grid), tuple(threadgroup)),
        *((name, type(value), value) for name, value in (template or {}).items()),
    )
    if key not in _texts:
        _texts[key] = source_for(kernel, arrays, *launch)
    return _texts[key]


@contextmanager
def through_shim(order: Order = "forward", sanitize: Sanitize = None) -> Iterator[None]:
    """Launches run on the shim meanwhile, so that wrappers run as they are."""

    def call(self: Launch, *inputs: mx.array) -> list[mx.array]:
        results = run_msl(
            self.kernel,
            inputs,
            self.output_shapes,
            self.output_dtypes,
            self.grid,
            self.threadgroup,
            dict(self.template),
            self.init_value,
            order=order,
            sanitize=sanitize,
        )
        return [mx.array(r).astype(d) for r, d in zip(results, self.output_dtypes, strict=True)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "__call__", call)
        yield


def _written(kernel: MetalKernel, inputs: Sequence[Any]) -> dict[str, tuple[mx.array, bytes]]:
    """The inputs that are written into, and what they hold before."""
    mx.eval(inputs)
    return {
        name: (array, _numpy(array).tobytes())
        for name, array in zip(kernel.inputs, inputs, strict=True)
        if name in kernel.writes
    }


def _put(array: mx.array, data: bytes) -> None:
    """Into the array's own memory."""
    view = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)
    assert view.flags.c_contiguous
    ctypes.memmove(view.__array_interface__["data"][0], data, array.nbytes)


def _executed(command: list[str], message: bytes) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, **QUIET}
    return subprocess.run(command, input=message, capture_output=True, env=environment)


def _initial(shape: tuple[int, ...], dtype: mx.Dtype, value: float | None) -> np.ndarray:
    zeros = _numpy(mx.zeros(shape, dtype))
    if value is None:
        return np.frombuffer(b"\xff" * zeros.nbytes, zeros.dtype).reshape(shape)
    return _numpy(mx.full(shape, value, dtype))


def _numpy(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _buffers(msl: Msl, inputs: list[mx.array], outputs: list[np.ndarray]) -> list[bytes]:
    """The contents of all buffers of the signature, in its order."""
    waiting, results = list(inputs), list(outputs)
    contents, last = [], mx.array(0)
    for buffer in msl.buffers:
        kind = buffer.name.rpartition("_")[2]
        if buffer.output:
            data = results.pop(0)
        elif kind in ("shape", "strides", "ndim") and _describes(msl, buffer.name):
            strides = np.cumprod([1, *last.shape[:0:-1]])[::-1]
            described: dict[str, np.ndarray] = {
                "shape": np.array(last.shape, np.int32),
                "strides": np.array(strides, np.int64),
                "ndim": np.array(last.ndim, np.int32),
            }
            data = described[kind]
        else:
            last = waiting.pop(0)
            data = _numpy(last)
        contents.append(data.tobytes())
    assert not waiting + results, "the kernel's text is of another launch"
    return contents


def _describes(msl: Msl, name: str) -> bool:
    return name.rpartition("_")[0] in {buffer.name for buffer in msl.buffers}


def _words(code: int, errors: str, text: str) -> str:
    """What went wrong, with the lines of the kernel that it speaks of."""
    found = FOUND.search(errors)
    if code == 3 or found is None:
        summary = errors.strip() or f"ended by signal {-code}"
    else:
        where = re.findall(r"kernel\.metal:(\d+)", errors)
        summary = re.sub(r" \(pid=\d+\)", "", found[1]) + (f" in line {where[0]}" if where else "")
        if code == 66 and len(where) > 1:
            other = next((line for line in where[1:] if line != where[0]), where[0])
            summary += f" and in line {other}"
    lines = text.splitlines()
    quoted = dict.fromkeys(int(n) for n in re.findall(r"(?:line |kernel\.metal:)(\d+)", summary))
    for n in quoted:
        if 0 < n <= len(lines):
            summary += f"\n  {n}: {lines[n - 1].strip()}"
    return summary
