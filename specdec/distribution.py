"""Distribution: what the next token is drawn from, and how it is drawn."""

from dataclasses import dataclass

import numpy as np

_RUN = 256  # tokens whose weights are summed first: the running sum over all would be the slowest


@dataclass(frozen=True, eq=False)
class Distribution:
    """Tokens and their weights, which need not sum to 1.

    ids: int [n], ascending; None where the tokens are 0 to n - 1.
    weights: float64 [n], finite, at least 0, one of them above.
    """

    ids: np.ndarray | None
    weights: np.ndarray

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """float64 [len(tokens)]: of these tokens, 0 for those that are not in it."""
        at, found = self._places(tokens)
        return np.where(found, self.weights[at], 0.0) / self.weights.sum()

    def without(self, tokens: np.ndarray) -> "Distribution | None":
        """The same with some tokens at weight 0; None where no weight is left."""
        at, found = self._places(tokens)
        weights = self.weights.copy()
        weights[at[found]] = 0.0
        return Distribution(self.ids, weights) if weights.any() else None

    def draw(self, uniform: float) -> int:
        """The token at which the running sum of the weights, by ascending id, first exceeds
        `uniform` (in [0, 1)) times their total.

        Sums are float64, of runs of 256 tokens first: always in the same order.
        """
        totals = np.cumsum(np.add.reduceat(self.weights, np.arange(0, len(self.weights), _RUN)))
        goal = uniform * totals[-1]
        run = min(int(np.searchsorted(totals, goal, side="right")), len(totals) - 1)
        first = run * _RUN
        weights = self.weights[first : first + _RUN]
        if run:
            goal -= totals[run - 1]
        at = int(np.searchsorted(np.cumsum(weights), goal, side="right"))
        if at == len(weights):  # rounding: the run's last token that can be drawn
            at = int(np.flatnonzero(weights)[-1])
        return first + at if self.ids is None else int(self.ids[first + at])

    def _places(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where tokens stand among the weights, and which of them do."""
        if self.ids is None:
            return tokens, np.ones(len(tokens), bool)
        at = np.minimum(np.searchsorted(self.ids, tokens), len(self.ids) - 1)
        return at, self.ids[at] == tokens
