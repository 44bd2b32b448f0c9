"""TreeLayout: the index arrays of one verify pass, computed on the host once for all layers."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import mlx.core as mx
import numpy as np

LAYOUTS = 256  # kept, the latest used


@dataclass(frozen=True, eq=False)
class Level:
    """The rows of one depth and where their parents stand in the level above.

    parents is None when the level takes over the level above row by row (a chain).
    """

    rows: np.ndarray  # int32 [n]
    parents: np.ndarray | None  # int32 [n], index into the level above


@dataclass(frozen=True, eq=False)
class TreeLayout:
    """Ancestors, depths and levels of a tree given by its parents (int32 [rows], root -1).

    A parent's row index is smaller than its children's; row 0 is the only root.
    """

    parents: np.ndarray

    def __post_init__(self) -> None:
        assert self.parents[0] == -1
        assert all(0 <= self.parents[row] < row for row in range(1, len(self.parents)))

    @classmethod
    def of(cls, parents: np.ndarray) -> "TreeLayout":
        """The layout of a tree of this shape, with what was cached when it last occurred: drafted
        trees have few shapes."""
        return _of(np.asarray(parents, np.int32).tobytes())

    @property
    def rows(self) -> int:
        return len(self.parents)

    @classmethod
    def chain(cls, rows: int) -> "TreeLayout":
        """A tree without branches: consecutive rows."""
        return cls(np.arange(-1, rows - 1, dtype=np.int32))

    @cached_property
    def is_chain(self) -> bool:
        return bool((self.parents == np.arange(-1, self.rows - 1)).all())

    @cached_property
    def paths(self) -> np.ndarray:
        """int32 [rows, depth + 1]: the rows from the root to each row, padded with -1."""
        if self.is_chain:
            above = np.arange(self.rows, dtype=np.int32)
            return np.where(above <= above[:, None], above, np.int32(-1))
        paths: list[list[int]] = []
        for row, parent in enumerate(self.parents):
            paths.append([*paths[parent], row] if row else [0])
        table = np.full((self.rows, max(map(len, paths))), -1, np.int32)
        for row, path in enumerate(paths):
            table[row, : len(path)] = path
        return table

    @cached_property
    def depths(self) -> np.ndarray:
        """int32 [rows], 0 for the root."""
        return ((self.paths >= 0).sum(axis=1) - 1).astype(np.int32)

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """Rows by depth, the root's level first."""
        levels = []
        above = np.array([-1], np.int32)
        for depth in range(self.paths.shape[1]):
            rows = np.flatnonzero(self.depths == depth).astype(np.int32)
            parents = np.searchsorted(above, self.parents[rows]).astype(np.int32)
            same = np.array_equal(parents, np.arange(len(above)))
            levels.append(Level(rows, None if same else parents))
            above = rows
        return tuple(levels)

    @cached_property
    def level_order(self) -> mx.array | None:
        """int32 [rows]: where each row stands when the levels are laid end to end.

        None when that is the row order already.
        """
        order = np.concatenate([level.rows for level in self.levels])
        if np.array_equal(order, np.arange(self.rows)):
            return None
        return mx.array(np.argsort(order).astype(np.int32))

    def windows(self, taps: int) -> np.ndarray:
        """int32 [rows, taps]: what a causal convolution of `taps` taps sees along each row's path.

        Indexes into the taps - 1 committed rows followed by the tree's rows, oldest first.
        """
        if taps in self._windows:
            return self._windows[taps]
        distance = np.arange(taps - 1, -1, -1)  # of each tap to the row, in tokens
        up = self.depths[:, None] - distance  # depth of the ancestor, negative before the root
        ancestors = np.take_along_axis(self.paths, np.maximum(up, 0), axis=1)
        windows = np.where(up >= 0, taps - 1 + ancestors, taps - 1 + up).astype(np.int32)
        self._windows[taps] = windows  # every layer asks for the same
        return windows

    @cached_property
    def on_device(self) -> dict[str, mx.array]:
        """What an executor made of this tree for its kernels, by names of its own."""
        return {}

    @cached_property
    def _windows(self) -> dict[int, np.ndarray]:
        return {}


@lru_cache(maxsize=LAYOUTS)
def _of(parents: bytes) -> TreeLayout:
    # a copy: Numba compiles other code for arrays that cannot be written to, as the bytes
    return TreeLayout(np.frombuffer(parents, np.int32).copy())
