"""Written: order among kernels that write into arrays that they are given.

To MLX what a kernel reads never changes, so it orders kernels by who made what. One that writes
into a buffer therefore gives an array that nobody reads, `done`, and what is to come after it takes
that as `order`. Where the host writes, or copies a buffer, it waits (`settle`).
"""

from functools import cache

import mlx.core as mx

from specdec.kernels.array import Array, evaluate


class Written:
    """What was written last into the buffers of one owner."""

    def __init__(self, dtype: mx.Dtype) -> None:
        """dtype: of the buffers."""
        self._dtype = dtype
        self._last: Array | None = None

    @property
    def order(self) -> Array:
        """For the next one that writes or reads: [8]."""
        return _nothing(self._dtype) if self._last is None else self._last

    def by(self, done: Array) -> None:
        """A kernel was begun that came after `order`."""
        self._last = done

    def settle(self) -> None:
        """Wait until all is written."""
        if self._last is not None:
            evaluate(self._last)
            self._last = None


@cache
def _nothing(dtype: mx.Dtype) -> Array:
    return mx.zeros(8, dtype)
