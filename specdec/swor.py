"""swor: drafted tokens drawn without replacement, accepted by the residual rule.

Where the draft's distribution is like the target's, a token drawn from it is accepted far more
often than the most probable one is drawn by the target. The text follows the target's distribution
exactly, but it is not the text of plain decoding with the same seed.

The shape of a tree is a function of the draft's probabilities, by rank, and of the budget. Which
token stands at a node is drawn, and has no say in whether the node exists: a tree that left out
drawn tokens because they are improbable would emit them too rarely.
"""

from dataclasses import dataclass

import numpy as np

from specdec.kernels.array import Array
from specdec.matching import Matching, host_rows
from specdec.residual import accept
from specdec.sampling import Sampling
from specdec.target.pending import Verdict
from specdec.tree.block import Block
from specdec.tree.build import build
from specdec.tree.draft_tree import DraftTree
from specdec.uniforms import ACCEPT, DRAWS, uniforms

WIDTH = 32
"""Candidates of a slot among which tokens are drawn, at least."""


class Swor(Matching):
    """Draws the drafted tokens, and accepts them by the residual rule."""

    def __init__(self, sampling: Sampling) -> None:
        super().__init__(sampling)
        self._drawn = _Drawn(np.zeros((0, 1), np.int32), np.zeros((0, 1)))

    def width(self, budget: int) -> int:
        return max(budget, WIDTH)

    def grow(self, bonus: int, block: Block, budget: int, kind: str) -> DraftTree:
        q = draft_probabilities(block, self._sampling)
        numbers = uniforms(self._sampling.seed, self._length, q.size, DRAWS).reshape(q.shape)
        order = drawing_order(q, numbers)
        self._drawn = _Drawn(
            np.take_along_axis(block.tokens, order, axis=1), np.take_along_axis(q, order, axis=1)
        )
        with np.errstate(divide="ignore"):
            ranks = Block(self._drawn.tokens, np.log(q))
        tree = build(bonus, ranks, budget, kind)
        rows = int(np.isfinite(tree.log_weights).sum())  # beyond what q holds nothing is drawn
        return tree.first(rows)

    def walk(
        self, tree: DraftTree, logits: Array, verdict: Verdict | None = None
    ) -> tuple[tuple[int, ...], int]:
        rows, path, tokens = host_rows(logits), [0], [int(tree.tokens[0])]
        while True:
            children = np.flatnonzero(tree.parents == path[-1])
            if len(children) == 0 or not np.isfinite(rows[path[-1]]).all():
                return tuple(path), self._token(rows[path[-1]], tokens)
            target = self._distribution(rows[path[-1]], tokens)
            candidates, q = self._drawn.slot(len(path) - 1)
            position = self._length + len(tokens)
            chances = uniforms(self._sampling.seed, position, len(children), ACCEPT)
            token, at = accept(target, candidates, q, chances, self._uniform(tokens))
            if at is None:
                return tuple(path), token
            assert tree.tokens[children[at]] == token
            path.append(int(children[at]))
            tokens.append(token)


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Every slot's candidates in the order drawn: tokens int [slots, width] and their draft
    probabilities, 0 for those that cannot be drawn, which stand last."""

    tokens: np.ndarray
    probabilities: np.ndarray

    def slot(self, at: int) -> tuple[np.ndarray, np.ndarray]:
        count = int(np.count_nonzero(self.probabilities[at]))
        return self.tokens[at, :count], self.probabilities[at, :count]


def draft_probabilities(block: Block, sampling: Sampling) -> np.ndarray:
    """float64 [slots, width]: what tokens are drawn from, falling along a slot, 0 where filtered.

    The filters and the temperature of the target's own tokens, so that q is like p; the repetition
    penalty is left out, for it would be another one on every path.
    """
    logs = block.log_probs
    masses = np.cumsum(np.exp(logs), axis=1) - np.exp(logs)
    kept = np.isfinite(logs) & (masses < sampling.top_p)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        kept &= logs >= logs[:, :1] + np.log(sampling.min_p)
        weights = np.exp((logs - logs[:, :1]) / sampling.temperature)
    if sampling.top_k:
        kept[:, sampling.top_k :] = False
    weights = np.where(kept, weights, 0.0)
    return weights / weights.sum(axis=1, keepdims=True)


def drawing_order(q: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """int [slots, width]: the order in which a slot's candidates are drawn without replacement.

    By falling log q + Gumbel noise, which is drawing one after the other from what q has left
    (Yellott 1977). numbers: uniform in (0, 1) [slots, width].
    """
    with np.errstate(divide="ignore"):
        keys = np.log(q) - np.log(-np.log(numbers))
    return np.argsort(-keys, axis=1, kind="stable")
