"""Budget: how many tree nodes a round drafts and verifies, asked round by round.

`Fixed` is the user's number. Any other budget only chooses how much is tried, never what is
emitted: the target decides every token.
"""

from dataclasses import dataclass
from typing import Protocol

from specdec.round import Round
from specdec.tree.draft_tree import DraftTree


class Budget(Protocol):
    """What the engine asks and tells in every round, in this order."""

    def limit(self) -> int:
        """The most nodes to draft for the next round; 1: no draft, the root alone."""

    def stays_plain(self) -> bool:
        """In a round of plain decoding: whether the next will be one too, as far as is known. Asked
        where a GPU can be given its pass before this one is read, and then is."""

    def cut(self, tree: DraftTree) -> DraftTree:
        """The part of a drafted tree that is worth verifying: its root, and nodes with all their
        ancestors, parents before children."""

    def learn(self, done: Round) -> None:
        """What came of the round, told after its commit."""


@dataclass(frozen=True)
class Fixed:
    """The same number of nodes in every round."""

    nodes: int

    def limit(self) -> int:
        return self.nodes

    def stays_plain(self) -> bool:
        return self.nodes == 1

    def cut(self, tree: DraftTree) -> DraftTree:
        return tree

    def learn(self, done: Round) -> None:
        pass
