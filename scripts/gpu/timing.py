"""Timing on the device: chains of dependent calls, queued behind other work so that the host's
time does not count.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import mlx.core as mx

from scripts.gpu.chip import on_gpu

CACHE_BYTES = 200_000_000  # of one chain: more than any GPU's cache holds


@dataclass(frozen=True)
class Timed:
    """Microseconds a call, on the device and on the host.

    hidden: whether the host had queued everything in time; else its pauses are part of `device`.
    """

    device: float
    host: float
    hidden: bool


@mx.compile
def linked(x: mx.array, out: mx.array) -> mx.array:
    """x, but not before out is there."""
    return x + (out.reshape(-1)[:1] * 0).astype(x.dtype)


class Stopwatch:
    """Times chains: call(x, i) for i = 0, 1, ..., each waiting for the one before."""

    def __init__(self, repeats: int = 5) -> None:
        self.repeats = repeats
        self._matrix = mx.random.normal((4096 if on_gpu() else 64,) * 2).astype(mx.bfloat16)
        self._matrix = self._matrix / 64
        mx.eval(self._matrix)
        self._each = self._block(10) / 10  # seconds of one product
        self._each = self._block(20) / 20
        self._links: dict[tuple, float] = {}

    def chain(self, call: Callable[[mx.array, int], mx.array], x: mx.array, count: int) -> Timed:
        """Of `count` calls that each wait for the one before, the link's own time taken off."""

        def build() -> mx.array:
            y = x
            for i in range(count):
                y = linked(x, call(y, i))
            return y

        key = (x.shape, x.dtype, count)
        if key not in self._links:
            self._links[key] = self._time(lambda: self._bare(x, count), count).device
        timed = self._time(build, count)
        return Timed(max(0.0, timed.device - self._links[key]), timed.host, timed.hidden)

    def natural(self, build: Callable[[], list[mx.array]], count: int) -> Timed:
        """Of `count` calls that depend on each other by themselves."""
        return self._time(build, count)

    @staticmethod
    def _bare(x: mx.array, count: int) -> mx.array:
        y = x
        for _ in range(count):
            y = linked(x, y)
        return y

    def _time(self, build: Callable, count: int) -> Timed:
        mx.eval(build())  # compiles
        start = perf_counter()
        mx.eval(build())
        spent = perf_counter() - start
        products = max(1, int(1.5 * spent / self._each)) if on_gpu() else 1
        device, host, hidden = [], [], True
        for _ in range(self.repeats):
            mx.synchronize()
            blocked = self._block(products)
            start = perf_counter()
            mx.async_eval(self._products(products))
            queued = perf_counter()
            y = build()
            mx.async_eval(y)
            ready = perf_counter()
            mx.eval(y)
            mx.synchronize()
            device.append(perf_counter() - start - blocked)
            host.append(ready - queued)
            hidden = hidden and ready - start < blocked
        scale = 1e6 / count
        return Timed(statistics.median(device) * scale, statistics.median(host) * scale, hidden)

    def _products(self, count: int) -> mx.array:
        y = self._matrix
        for _ in range(count):
            y = y @ self._matrix
        return y

    def _block(self, count: int) -> float:
        """Seconds of a chain of products."""
        mx.synchronize()
        start = perf_counter()
        mx.async_eval(y := self._products(count))
        mx.eval(y)
        mx.synchronize()
        return perf_counter() - start


def copy_rate(repeats: int = 10) -> float:
    """Bytes per second of a large copy, read and written."""
    x = mx.zeros((1 << (28 if on_gpu() else 22),), mx.float32)
    mx.eval(x, x + 1)
    seconds = []
    for _ in range(repeats):
        mx.synchronize()
        start = perf_counter()
        mx.eval(x + 1)
        mx.synchronize()
        seconds.append(perf_counter() - start)
    return 2 * x.nbytes / min(seconds)


def median_ms(call: Callable[[], object], repeats: int, warm: int = 2) -> float:
    """Wall time of a call, in ms; the call waits for its own results."""
    for _ in range(warm):
        call()
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)
    return statistics.median(seconds) * 1e3
