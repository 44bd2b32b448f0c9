"""DraftTree: the tokens one verify pass looks at, as the rooms hand it to each other.

Row 0 is the root, the bonus token of the last round; rows 1..n are drafted nodes, a parent always
above its children.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class DraftTree:
    """A tree of draft tokens under a root.

    tokens: int32 [rows], the root's first.
    parents: int32 [rows], -1 for the root, else a smaller row index.
    log_weights: float64 [rows], log of the draft's probability of the path down to the row
        (0 for the root).
    """

    tokens: np.ndarray
    parents: np.ndarray
    log_weights: np.ndarray

    def __post_init__(self) -> None:
        rows = len(self.tokens)
        assert rows >= 1
        assert self.parents.shape == self.log_weights.shape == (rows,)
        assert self.parents[0] == -1
        assert all(0 <= self.parents[row] < row for row in range(1, rows))

    @classmethod
    def root(cls, token: int) -> "DraftTree":
        """The empty tree: the root alone, which is plain autoregressive decoding."""
        return cls(np.array([token], np.int32), np.array([-1], np.int32), np.zeros(1))

    def first(self, rows: int) -> "DraftTree":
        """The tree of the first `rows` rows, 1 at least."""
        if rows >= self.rows:
            return self
        return DraftTree(self.tokens[:rows], self.parents[:rows], self.log_weights[:rows])

    @property
    def rows(self) -> int:
        """Verify rows: the root and every node."""
        return len(self.tokens)

    @cached_property
    def depths(self) -> np.ndarray:
        """int32 [rows]: 0 for the root, else one more than the parent's."""
        depths = np.zeros(self.rows, np.int32)
        for row in range(1, self.rows):
            depths[row] = depths[self.parents[row]] + 1
        return depths
