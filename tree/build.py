"""Grow a draft tree from a block under a node budget.

best-first: DDTree. A node's weight is the draft's log-probability of the path down to it, and the
`budget` heaviest paths are taken. A path is never lighter than its extensions, so the heaviest set
is closed under prefixes: it is a tree, and under the draft's (factorised) distribution no other
tree of that size has a higher expected number of accepted tokens.
chain: the most probable token of every slot, one below the other.
spine: that chain first, as far as the budget goes, then the rest best-first around it. The slots
were drafted jointly along the top path, so the chain is better than its factorised weight says.

Paths of equal weight are taken in lexicographic order of their ranks, shallower and lower rank
first, so that a tree is a function of its block alone.
"""

import heapq

import numpy as np

from specdec.tree.block import Block
from specdec.tree.draft_tree import DraftTree

KINDS = ("best-first", "chain", "spine")

# -log_weight, ranks from the root down, row of the parent: the heap's order as it stands
_Candidate = tuple[float, tuple[int, ...], int]


def build(root_token: int, block: Block, budget: int, kind: str = "best-first") -> DraftTree:
    """The tree of at most `budget` nodes under the bonus token `root_token`.

    It has exactly `budget` nodes unless the block holds fewer paths (a chain: fewer slots). Nodes
    stand in the order they were taken: best-first by falling weight, spine nodes first. Ranks
    needed are below `budget`, so a block of that width loses nothing.
    ValueError for an unknown kind or a budget below 0.
    """
    if kind not in KINDS:
        raise ValueError(f"tree kind {kind!r}, expected one of {', '.join(KINDS)}")
    if budget < 0:
        raise ValueError(f"budget {budget}, expected 0 or more nodes")
    growth = _Growth(root_token, block)
    candidates = [growth.first()]
    if kind != "best-first":
        candidates = growth.take_spine(min(budget, block.slots))
    if kind != "chain":
        growth.take_best(candidates, budget)
    return growth.finish()


class _Growth:
    """A tree under construction: the rows taken so far, and what each opens up."""

    def __init__(self, root_token: int, block: Block) -> None:
        self._tokens, self._parents, self._weights = [root_token], [-1], [0.0]
        # As nested lists: indexing single numbers of an array costs more than the heap.
        self._choices: list[list[int]] = block.tokens.tolist()
        self._log_probs: list[list[float]] = block.log_probs.tolist()

    def first(self) -> _Candidate:
        return self._candidate((0,), 0)

    def take_spine(self, nodes: int) -> list[_Candidate]:
        """Take the first `nodes` nodes of the top path; returns the candidates they open."""
        opened: list[_Candidate] = []
        spine = [self.first()]
        for _ in range(nodes):
            taken = spine.pop()
            row = self._take(taken)
            spine += self._child(taken, row)
            opened += self._sibling(taken)
        return spine + opened

    def take_best(self, candidates: list[_Candidate], budget: int) -> None:
        """Take the heaviest candidate until `budget` nodes stand or none is left."""
        heapq.heapify(candidates)
        while candidates and len(self._tokens) <= budget:
            taken = heapq.heappop(candidates)
            row = self._take(taken)
            for opened in self._child(taken, row) + self._sibling(taken):
                heapq.heappush(candidates, opened)

    def finish(self) -> DraftTree:
        return DraftTree(
            np.array(self._tokens, np.int32),
            np.array(self._parents, np.int32),
            np.array(self._weights, np.float64),
        )

    def _take(self, candidate: _Candidate) -> int:
        weight, ranks, parent = candidate
        self._tokens.append(self._choices[len(ranks) - 1][ranks[-1]])
        self._parents.append(parent)
        self._weights.append(-weight)
        return len(self._tokens) - 1

    def _child(self, taken: _Candidate, row: int) -> list[_Candidate]:
        """The most probable continuation of a node just taken, if there is a slot for it."""
        ranks = taken[1]
        return [self._candidate((*ranks, 0), row)] if len(ranks) < len(self._choices) else []

    def _sibling(self, taken: _Candidate) -> list[_Candidate]:
        """The next most probable token in the place of a node just taken, if there is one."""
        *path, rank = taken[1]
        more = rank + 1 < len(self._choices[len(path)])
        return [self._candidate((*path, rank + 1), taken[2])] if more else []

    def _candidate(self, ranks: tuple[int, ...], parent: int) -> _Candidate:
        # Summed down the path, so that a node's weight has the same bits in every tree.
        weight = self._weights[parent] + self._log_probs[len(ranks) - 1][ranks[-1]]
        return -weight, ranks, parent
