"""Choosing tokens from logits, and the trees that go with it. Here greedily.

A chooser belongs to one request. It makes a tree of a drafted block, walks the verified tree to
the tokens that are emitted, and is told which tokens are committed. Others: matching.py, swor.py.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array, is_numpy, to_numpy
from specdec.target.pending import Verdict
from specdec.tree.block import Block
from specdec.tree.build import build
from specdec.tree.draft_tree import DraftTree
from specdec.tree.walk import walk


def greedy(logits: Array) -> np.ndarray:
    """logits [rows, vocab] -> int [rows]: the most probable token, the lowest id among equals."""
    if is_numpy(logits):
        return logits.argmax(axis=-1)
    return to_numpy(mx.argmax(logits, axis=-1))


class Greedy:
    """Takes the most probable token after every row: found on the device, read back at once."""

    on_device = True
    """Whether a GPU can walk by itself: what comes next can be begun before the host knows."""

    def width(self, budget: int) -> int:
        """How many candidates of every slot the draft must name for a tree of `budget` nodes."""
        return budget

    def grow(self, bonus: int, block: Block, budget: int, kind: str) -> DraftTree:
        """The tree to verify under the bonus token."""
        return build(bonus, block, budget, kind)

    def first(self, logits: Array) -> int:
        """The token after the prompt: logits [1, vocab]."""
        return self.walk(DraftTree.root(0), logits)[1]

    def walk(
        self, tree: DraftTree, logits: Array, verdict: Verdict | None = None
    ) -> tuple[tuple[int, ...], int]:
        """The rows to commit, the root first, and the bonus token: logits [rows, vocab], and what
        a GPU says of them.

        Changes nothing, so that a round can be run again after an error.
        """
        chosen = greedy(logits) if verdict is None else verdict.best
        return walk(tree, lambda row: int(chosen[row]))

    def commit(self, tokens: Sequence[int]) -> None:
        """Tokens that are part of the text from now on."""
