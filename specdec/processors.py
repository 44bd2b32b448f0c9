"""Processors: from the logits of a row to the distribution that its token is drawn from.

In mlx-lm's order: the repetition penalty on the logits; top-p, min-p and top-k on the probabilities
at temperature 1, each of all tokens; the temperature last. Each filter keeps the most probable
tokens down to some rank, so the three together keep the shortest of the three lists.

Exact for large vocabularies without sorting them: bounds are found first, and only the tokens
between them are sorted. All results are functions of the values alone.
"""

import math

import numpy as np

from specdec.distribution import Distribution
from specdec.sampling import Sampling

_RUN = 256  # neighbouring ids whose maximum is looked at first
# Looking for a nucleus: how far below the largest logit, how many tokens are sorted without more
# ado, slices per unit of a logit, and the last slice, for all that is further below.
_REACHES = (4.0, 8.0, 12.0, np.inf)
_FEW = 2048
_SLICES, _FURTHEST = 32, 1023
# Temperatures and penalties beyond these, near which float32 ends, act as these do.
_LEAST, _MOST = 1e-30, 1e38


def distribution(logits: np.ndarray, sampling: Sampling, seen: np.ndarray) -> Distribution:
    """What the token after a row is drawn from, for a temperature above 0.

    logits: float32 [vocab], finite; unchanged. seen: int [n], tokens of the text so far, in any
    order and number. Weights are exp((logit - largest) / temperature), computed in float32.
    """
    logits = penalized(logits, sampling.repetition_penalty, seen)
    ids = kept(logits, sampling)
    values = logits if ids is None else logits[ids]
    temperature = _within(sampling.temperature)
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((values - values.max()) / temperature)
    return Distribution(ids, weights.astype(np.float64))


def penalized(logits: np.ndarray, penalty: float, seen: np.ndarray) -> np.ndarray:
    """The logits, those of `seen` tokens divided by the penalty, or multiplied if negative
    (Keskar et al. 2019; as often as a token was seen)."""
    if penalty == 1.0:
        return logits
    logits = logits.copy()
    values, factor = logits[seen], _within(penalty)
    with np.errstate(over="ignore", under="ignore"):
        values = np.where(values < 0, values * factor, values / factor)
    bound = np.finfo(np.float32).max
    logits[seen] = np.clip(values, -bound, bound)
    return logits


def _within(number: float) -> np.float32:
    return np.float32(min(max(number, _LEAST), _MOST))


def kept(logits: np.ndarray, sampling: Sampling) -> np.ndarray | None:
    """The ids that top-p, min-p and top-k leave, ascending; None where they leave all.

    Equally probable tokens are kept or dropped together by top-p and min-p; top-k takes the lower
    ids of them.
    """
    least = -math.inf
    if sampling.top_p < 1.0:
        least = nucleus(logits, sampling.top_p)
    if sampling.min_p > 0.0:
        least = max(least, float(logits.max() + np.float32(math.log(sampling.min_p))))
    if 0 < sampling.top_k < len(logits):
        ids = top(logits, sampling.top_k)
        return ids[logits[ids] >= np.float32(least)]
    return None if least == -math.inf else np.flatnonzero(logits >= np.float32(least))


def nucleus(logits: np.ndarray, top_p: float) -> float:
    """The smallest logit that top-p keeps.

    A token is kept where the tokens above it hold less than top_p of the probability (Holtzman et
    al. 2020).
    """
    with np.errstate(over="ignore", under="ignore"):
        below = logits.max() - logits
        weights = np.exp(-below)
    goal = top_p * weights.sum(dtype=np.float64)
    for reach in _REACHES:  # mostly a few tokens near the top hold enough
        near = np.flatnonzero(below <= reach)
        if weights[near].sum(dtype=np.float64) >= goal:
            break
    held = 0.0
    if len(near) > _FEW:  # of many, only the slice of logits where the sum crosses is sorted
        with np.errstate(over="ignore"):
            slices = np.minimum(below[near] * _SLICES, _FURTHEST).astype(np.intp)
        through = np.cumsum(np.bincount(slices, weights[near]))
        crossing = min(int(np.searchsorted(through, goal)), len(through) - 1)
        held = float(through[crossing - 1]) if crossing else 0.0
        near = near[slices == crossing]
    near = near[np.argsort(below[near], kind="stable")]
    masses = held + np.cumsum(weights[near], dtype=np.float64)
    # What lies above a token counts, not the token itself: the one that crosses stays.
    return float(logits[near[min(int(np.searchsorted(masses, goal)), len(near) - 1)]])


def top(logits: np.ndarray, count: int) -> np.ndarray:
    """The ids of the `count` largest logits, ascending; of equal ones the lower ids."""
    # The best tokens stand in the best runs: all but a few runs hold none.
    best = np.maximum.reduceat(logits, np.arange(0, len(logits), _RUN))
    bound = np.partition(best, -count)[-count] if count < len(best) else -np.inf
    ids = np.flatnonzero(logits >= bound)
    values = logits[ids]
    least = np.partition(values, -count)[-count]
    above, equal = ids[values > least], ids[values == least]
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))
