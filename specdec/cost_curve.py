"""CostCurve: what a pass costs by its number of rows and the context, learned from passes.

A Kalman filter over the costs at 1, 2, ... rows and over how they grow with the context and with
experts that are not in memory. Its prior says that costs are smooth in the rows, so that a row
count which was never tried gets a value from its neighbours and an uncertainty from its distance to
them; what happens to the whole machine (another process, heat) moves all of them together. A single
slow pass moves it little: an observation counts for `OUTLIER` standard deviations at most, and the
first use of a kernel, which may compile it, is not believed when it is slow.
"""

from collections.abc import Sequence

import numpy as np

# All relative to the cost of one row.
SLOPE = 0.4  # uncertainty of the cost of each further row
ROUGH = 0.1  # of a row's cost beside the line through the others, per square root of the distance
# Uncertainty of the growth: of a pass and of each row per THOUSAND tokens of context, and of a pass
# per HUNDRED misses.
GROWTH = (0.1, 0.03, 2.0)
THOUSAND, HUNDRED = 1000.0, 100.0
# Relative to the cost, per observation.
COMMON, OWN = 0.015, 0.003  # drift of all rows together, and of each by itself
OUTLIER = 2.5
FIRST_USE = 1.5  # times what was expected: a first use above it is no measurement

_FIRST = [0, -3, -2, -1]  # of the state: the cost of one row, the growths


class CostCurve:
    """Costs in any unit, by rows from 1 on."""

    def __init__(self, shape: Sequence[float], noise: float, compiled_each: bool = False) -> None:
        """shape: expected costs of 1, 2, ... rows, the first being 1. noise: relative standard
        deviation of an observation. compiled_each: whether each number of rows has kernels of its
        own; else one row has, and several have."""
        self.shape, self.noise = np.array(shape, np.float64), noise
        self._compiled_each, self._compiled = compiled_each, set[int]()
        self.rows = len(self.shape)
        self.seen = [0] * self.rows  # observations by rows, those of one row first
        self.most_rows = 2  # of an observation; to begin with, what is cheap to try
        self._mean: np.ndarray | None = None  # [rows + 3]: costs without context, then growths
        self._covariance = np.zeros((self.rows + 3, self.rows + 3))
        self._variances = self._covariance.reshape(-1)[:: self.rows + 4]  # a view

    @property
    def known(self) -> bool:
        """Whether there is anything to go by."""
        return self._mean is not None

    def add(self, rows: int, context: int, cost: float, misses: int = 0) -> None:
        """A pass of `rows` rows after `context` tokens, with so many misses, cost this much."""
        kind = rows if self._compiled_each else min(rows, 2)
        first = kind not in self._compiled
        self._compiled.add(kind)
        self.seen[rows - 1] += 1
        self.most_rows = max(self.most_rows, rows)
        if self._mean is None:
            if not first:
                self._begin(cost / self.shape[rows - 1])
            return
        mean, covariance = self._mean, self._covariance
        grown = np.array([context / THOUSAND, rows * context / THOUSAND, misses / HUNDRED])
        values = mean[:-3]
        covariance[:-3, :-3] += (COMMON**2 * values)[:, None] * values
        self._variances[:-3] += (OWN * values) ** 2
        expected = mean[rows - 1] + grown @ mean[-3:]
        wrong = cost - expected
        if first and wrong > (FIRST_USE - 1) * expected:
            return
        gain = covariance[rows - 1] + grown @ covariance[-3:]
        variance = gain[rows - 1] + grown @ gain[-3:]
        variance += (self.noise * expected) ** 2
        variance = max(variance, (wrong / OUTLIER) ** 2)
        if variance > 0:
            mean += gain * (wrong / variance)
            covariance -= (gain / variance)[:, None] * gain

    def one_row(self, context: int, misses: float = 0.0) -> float:
        """`costs(context, ...)[0]` with so many misses, in less time."""
        assert self._mean is not None
        value, each, per_row, per_miss = (max(one, 0.0) for one in self._mean[_FIRST].tolist())
        return value + context / THOUSAND * (each + per_row) + misses / HUNDRED * per_miss

    def costs(
        self, context: int, misses: np.ndarray | float = 0.0, optimism: float = 0.0
    ) -> np.ndarray:
        """Expected costs of 1, 2, ... rows [rows], less `optimism` standard deviations each.

        misses: expected of each, [rows]. Never negative, and more rows never cost less.
        """
        assert self._mean is not None
        mean = self._mean
        each, per_row, per_miss = np.maximum(mean[-3:], 0.0)
        costs = mean[:-3] + context / THOUSAND * (each + per_row * np.arange(1, self.rows + 1))
        costs += np.asarray(misses) / HUNDRED * per_miss
        if optimism:
            costs = costs - optimism * np.sqrt(np.maximum(self._variances[:-3], 0.0))
        return np.maximum.accumulate(np.maximum(costs, 0.0))

    def _begin(self, scale: float) -> None:
        """The prior, once one cost is known: `scale` for one row."""
        beyond = np.arange(self.rows)
        self._mean = np.append(scale * self.shape, [0.0, 0.0, 0.0])
        covariance = np.outer(self.shape, self.shape) + SLOPE**2 * np.outer(beyond, beyond)
        covariance += ROUGH**2 * np.minimum.outer(beyond, beyond)
        self._covariance[:-3, :-3] = scale**2 * covariance
        self._variances[-3:] = (scale * np.array(GROWTH)) ** 2
