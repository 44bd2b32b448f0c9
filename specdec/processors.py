"""Processors: from the logits of a row to the distribution that its token is drawn from.

In mlx-lm's order: the repetition penalty on the logits; top-p, min-p and top-k on the probabilities
at temperature 1, each of all tokens; the temperature last. Each filter keeps the most probable
tokens down to some rank, so the three together keep the shortest of the three lists.

Exact for large vocabularies without sorting them: a threshold is found first, and only the tokens
around it are sorted. All results are functions of the values alone.
"""

import math

import numpy as np

from specdec.distribution import Distribution
from specdec.sampling import Sampling

_RUN = 256  # neighbouring ids whose maximum is looked at first
_BAND = 1.0  # width in logits of what is sorted at a time to find a nucleus
_COLDEST = 1e-30  # colder is as cold: any two different logits are then infinitely far apart


def distribution(logits: np.ndarray, sampling: Sampling, seen: np.ndarray) -> Distribution:
    """What the token after a row is drawn from, for a temperature above 0.

    logits: float32 [vocab], finite; unchanged. seen: int [n], tokens of the text so far, in any
    order and number. Weights are exp((logit - largest) / temperature), computed in float32.
    """
    logits = penalized(logits, sampling.repetition_penalty, seen)
    ids = kept(logits, sampling)
    values = logits if ids is None else logits[ids]
    temperature = np.float32(max(sampling.temperature, _COLDEST))
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((values - values.max()) / temperature)
    return Distribution(ids, weights.astype(np.float64))


def penalized(logits: np.ndarray, penalty: float, seen: np.ndarray) -> np.ndarray:
    """The logits, those of `seen` tokens divided by the penalty, or multiplied if negative
    (Keskar et al. 2019; as often as a token was seen)."""
    if penalty == 1.0:
        return logits
    logits = logits.copy()
    values = logits[seen]
    with np.errstate(over="ignore"):
        values = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))
    bound = np.finfo(np.float32).max
    logits[seen] = np.clip(values, -bound, bound)
    return logits


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
    ids = None if least == -math.inf else np.flatnonzero(logits >= np.float32(least))
    if 0 < sampling.top_k < (len(logits) if ids is None else len(ids)):
        return top(logits, sampling.top_k, ids)
    return ids


def nucleus(logits: np.ndarray, top_p: float) -> float:
    """The smallest logit that top-p keeps.

    A token is kept where the tokens above it hold less than top_p of the probability (Holtzman et
    al. 2020).
    """
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp(logits - logits.max())
    goal, held = top_p * weights.sum(dtype=np.float64), 0.0
    while True:
        band = logits >= logits.max() - np.float32(_BAND)
        values = logits[band]
        order = np.argsort(-values, kind="stable")
        masses = held + np.cumsum(weights[band][order], dtype=np.float64)
        if masses[-1] >= goal or band.all():
            # What lies above a token counts, not the token itself: the one that crosses stays.
            crossing = int(np.searchsorted(masses, goal))
            return float(values[order[min(crossing, len(order) - 1)]])
        held = float(masses[-1])
        logits, weights = logits[~band], weights[~band]


def top(logits: np.ndarray, count: int, ids: np.ndarray | None = None) -> np.ndarray:
    """The ids of the `count` largest logits, ascending; of equal ones the lower ids.

    ids: those to choose from, ascending and more than `count`; None for all.
    """
    if ids is None:
        # The best tokens stand in the best runs: all but a few runs hold none.
        best = np.maximum.reduceat(logits, np.arange(0, len(logits), _RUN))
        least = np.partition(best, -count)[-count] if count < len(best) else -np.inf
        ids = np.flatnonzero(logits >= least)
    values = logits[ids]
    least = np.partition(values, -count)[-count]
    above, equal = ids[values > least], ids[values == least]
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))
