"""Whether kernels write into arrays that they are given (kernels/written.py).

MLX writes in place only into what nobody else reads at the same time, and copies it otherwise: on a
GPU, where a pass is begun while the one before runs, all keys and values of a layer. On CUDA a
kernel's inputs are plain pointers. On Metal they are declared as never written to, and no Apple GPU
has yet shown what becomes of a write: there rows go through MLX.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


class _InPlace:
    forced: bool | None = None


_in_place = _InPlace()


def in_place() -> bool:
    """Whether they do."""
    return mx.cuda.is_available() if _in_place.forced is None else _in_place.forced


@contextmanager
def write_in_place(on: bool = True) -> Iterator[None]:
    """Have them do so, or not, for a while."""
    before = _in_place.forced
    _in_place.forced = on
    try:
        yield
    finally:
        _in_place.forced = before
