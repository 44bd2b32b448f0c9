"""Resident: arrays for kernels in the device's own memory.

What the host wrote lies in memory that both share page by page; so does, in MLX for CUDA, every
array of up to 8 bytes. A kernel that reads such a page after the host used it waits 15 to 20
microseconds, longer than most kernels run. So what does not change from pass to pass is copied by
the device once, in 8 elements at least.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np


def resident(values: Sequence[float] | np.ndarray, dtype: mx.Dtype) -> mx.array:
    """The values; a list is followed by zeros up to 8 elements."""
    if not isinstance(values, np.ndarray):
        values = np.array([*values, *[0] * (8 - len(values))])
    return moved(mx.array(values).astype(dtype))


def moved(array: mx.array) -> mx.array:
    """A copy made by the device."""
    copied = mx.where(mx.array(True), array, array)  # which nothing but a kernel can do
    mx.eval(copied)
    return copied


def met(arrays: Sequence[mx.array]) -> None:
    """Have the device meet every page of what the host wrote, rather than amid its work."""
    mx.eval([array.max() for array in arrays])
