"""Calibration: how often the target takes what the draft proposes, against what the draft says.

The draft's probability of a child, given that its parent was accepted, is multiplied by a factor
that makes the past come out right: accepted children / sum of their probabilities. There is one for
each depth below the most probable path, and one for all children of other nodes: a draft that fills
its slots in one pass wrote them for the most probable path, and after another token they fit less.
Old rounds are forgotten, so that the factors follow the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from specdec.tree.draft_tree import DraftTree

FORGET = 0.99  # of a sum that gets a new observation
PRIOR = 8.0  # expected children that the prior factors count for
TOP, SIDE = 1.0, 0.7  # prior factors: children along the most probable path, and of other nodes
CERTAIN = 0.999


@dataclass(frozen=True)
class Edges:
    """A tree's rows as children: lists by row.

    depths: 0 for the root. probabilities: the draft's, given the parent; 1 for the root. spine:
    whether the row is the root or the most probable (first) child of such a row.
    """

    parents: list[int]
    depths: list[int]
    probabilities: list[float]
    spine: list[bool]

    @classmethod
    def of(cls, tree: DraftTree) -> Self:
        parents, logs = tree.parents.tolist(), tree.log_weights
        with np.errstate(invalid="ignore"):  # below a path of probability 0
            probabilities = np.exp(logs - logs[tree.parents]).tolist()
        depths, spine, end = [0], [True], 0
        probabilities[0] = 1.0
        for row in range(1, len(parents)):
            parent = parents[row]
            depths.append(depths[parent] + 1)
            spine.append(parent == end)
            if parent == end:
                end = row
        return cls(parents, depths, probabilities, spine)


class _Tally:
    """Accepted children against expected ones."""

    def __init__(self) -> None:
        self.accepted = self.expected = 0.0

    def add(self, probability: float, accepted: bool) -> None:
        self.accepted = FORGET * self.accepted + accepted
        self.expected = FORGET * self.expected + probability

    def factor(self, prior: float) -> float:
        return (self.accepted + PRIOR * prior) / (self.expected + PRIOR)


class Calibration:
    """Factors fitted to the rounds so far."""

    def __init__(self) -> None:
        self._top, self._side = _Tally(), _Tally()
        self._depths: list[_Tally] = []

    @property
    def side(self) -> float:
        """The factor of children of nodes beside the most probable path."""
        return self._side.factor(SIDE)

    def top(self, depth: int) -> float:
        """The factor of the children at this depth (1: of the root) of nodes on that path."""
        overall = self._top.factor(TOP)
        return self._depths[depth - 1].factor(overall) if depth <= len(self._depths) else overall

    def weights(self, edges: Edges) -> list[float]:
        """Calibrated probability that each row is accepted: 1 for the root, a parent's at most."""
        side, tops = self.side, [self.top(depth + 1) for depth in range(max(edges.depths))]
        weights = [1.0]
        for row in range(1, len(edges.parents)):
            parent = edges.parents[row]
            factor = tops[edges.depths[parent]] if edges.spine[parent] else side
            probability = edges.probabilities[row] * factor
            # Not min(): where the draft gave a path no probability, this is NaN, and counts as 0.
            weight = probability if probability < CERTAIN else CERTAIN if probability > 0 else 0.0
            weights.append(weights[parent] * weight)
        return weights

    def learn(self, edges: Edges, rows: int, path: Sequence[int]) -> None:
        """Of a tree whose first `rows` rows were verified, those on the path were accepted."""
        for row in range(1, rows):
            parent = edges.parents[row]
            if parent not in path or not edges.probabilities[row] >= 0:
                continue
            right = row in path
            if not edges.spine[parent]:
                self._side.add(edges.probabilities[row], right)
                continue
            depth = edges.depths[row]
            while len(self._depths) < depth:
                self._depths.append(_Tally())
            self._top.add(edges.probabilities[row], right)
            self._depths[depth - 1].add(edges.probabilities[row], right)
