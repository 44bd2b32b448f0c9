"""Sampling such that speculation changes no token: the target draws, drafted tokens must match."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from specdec.choose import Greedy
from specdec.distribution import Distribution
from specdec.kernels.array import Array, evaluate, is_numpy
from specdec.processors import distribution, penalized
from specdec.sampling import Sampling
from specdec.seen import Seen
from specdec.target.pending import Verdict
from specdec.tree.draft_tree import DraftTree
from specdec.tree.walk import walk
from specdec.uniforms import TARGET, uniforms


class Matching(Greedy):
    """Draws the target's token after every row of the path; drafted tokens count as they match.

    The random number for a token depends on the seed and its position alone, and the repetition
    penalty sees the row's own path, so the tokens are those of plain decoding.
    """

    on_device = False  # tokens are drawn on the host

    def __init__(self, sampling: Sampling) -> None:
        self._sampling, self._seen, self._length = sampling, Seen(), 0

    def first(self, logits: Array) -> int:
        return self._token(host_rows(logits)[0], [])

    def walk(
        self, tree: DraftTree, logits: Array, verdict: Verdict | None = None
    ) -> tuple[tuple[int, ...], int]:
        rows, path = host_rows(logits), list[int]()

        def choose(row: int) -> int:
            path.append(int(tree.tokens[row]))
            return self._token(rows[row], path)

        return walk(tree, choose)

    def commit(self, tokens: Sequence[int]) -> None:
        self._length += len(tokens)
        if self._sampling.repetition_penalty != 1.0:
            self._seen.add(tokens)

    def _token(self, logits: np.ndarray, path: Sequence[int]) -> int:
        """The token after the committed ones and those of the path."""
        if self._sampling.temperature == 0.0:
            penalty, seen = self._sampling.repetition_penalty, self._seen.along(path)
            return int(penalized(logits, penalty, seen).argmax())
        if not np.isfinite(logits).all():
            return 0  # the row is on the path: the commit refuses it
        return self._distribution(logits, path).draw(self._uniform(path))

    def _distribution(self, logits: np.ndarray, path: Sequence[int]) -> Distribution:
        return distribution(logits, self._sampling, self._seen.along(path))

    def _uniform(self, path: Sequence[int]) -> float:
        position = self._length + len(path)
        return float(uniforms(self._sampling.seed, position, 1, TARGET)[0])


def host_rows(logits: Array) -> np.ndarray:
    """float32 [rows, vocab] on the host; memory is shared where it can be, for few rows are read"""
    if is_numpy(logits):
        return logits
    logits = logits.astype(mx.float32)
    evaluate(logits)
    return np.array(logits, copy=False)
