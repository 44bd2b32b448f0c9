"""GrownTree: a draft tree that a GPU grew and the host need not have read."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from specdec.errors import NonFiniteError
from specdec.kernels.array import to_numpy
from specdec.kernels.gpu.grown import NO_CHANCE, Grown
from specdec.tree.draft_tree import DraftTree


@dataclass(frozen=True, eq=False)
class GrownTree:
    """made: the tree, and what kernels read of it, on the device."""

    made: Grown

    @property
    def rows(self) -> int:
        return len(self.made.tokens)

    @cached_property
    def _numbers(self) -> np.ndarray:
        return to_numpy(self.made.tree)

    def known(self, numbers: np.ndarray) -> None:
        """What was read back with other things, so as not to be read again."""
        self.__dict__["_numbers"] = numbers

    @cached_property
    def host(self) -> DraftTree:
        """The tree; waits for the draft. NonFiniteError on NaN or Inf in its logits."""
        numbers = self._numbers
        if not numbers[-1]:
            raise NonFiniteError("NaN or Inf in the draft's logits")
        tokens, parents, weights = numbers[:-1].reshape(3, self.rows)
        weights = weights.view(np.float32).astype(np.float64)
        weights[weights < NO_CHANCE] = -np.inf
        return DraftTree(tokens, parents, weights)
