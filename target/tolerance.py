"""Tolerance: routing that prefers experts which are in memory, within a margin. Not exact.

Per row, with T the tolerance, S its top-k experts and r the range of their logits (largest minus
smallest; where that is below 1e-6, as with top-1, |largest| + 1e-6 stands for it):

1. If all of S are in memory, nothing changes.
2. Candidates: experts in memory, not in S, with a logit of at least min(S) - T r; best first.
3. The absent members of S, the weakest first, are replaced by the best candidate that is left, as
   long as that one's logit is at least the member's own - T r.
4. The weights are those of the routing's softmax for the experts that are left.

After design of flash-moe's cache-aware routing (its pull request 13), with two changes: what is in
memory is known, not guessed from when it was last used; and all candidates are sorted before any is
taken. A row with a NaN among its logits is left alone, so that it is seen.
"""

from dataclasses import dataclass, replace

import numpy as np

from specdec.kernels.array import Array, Backend, to_numpy
from specdec.kernels.routing import Routing

FLAT = 1e-6  # logits closer together than this have no range to speak of


@dataclass(frozen=True)
class LayerSubstitutions:
    """What tolerance changed in one layer.

    rows, choices: rows that were routed, and experts they chose (rows x top-k).
    substituted: choices that were replaced.
    kl: sum over rows, in nats, of ln(router's mass on the exact top-k / on the experts taken). It
        is KL(taken || router) - KL(exact || router) of the renormalized choices, and 0 for a row
        without a substitution.
    """

    layer: int
    rows: int
    choices: int
    substituted: int
    kl: float


class Tolerance:
    """The margin, and what it changed since the counts were reset."""

    def __init__(self, fraction: float, normalize: bool, backend: Backend) -> None:
        """fraction: T above, larger than 0. normalize: as in kernels.routing.route."""
        assert fraction > 0
        self.fraction, self.normalize, self.backend = fraction, normalize, backend
        self.reset()

    def reset(self) -> None:
        self._counts: dict[int, LayerSubstitutions] = {}

    def counts(self) -> tuple[LayerSubstitutions, ...]:
        """Per layer that was asked, ascending."""
        return tuple(self._counts[layer] for layer in sorted(self._counts))

    def __call__(
        self, layer: int, logits: Array, routing: Routing, resident: np.ndarray
    ) -> Routing:
        """The routing with absent experts replaced where a resident one is about as good.

        logits [rows, experts] as they were routed; resident: ids of the layer's experts in memory.
        The very same object when nothing is replaced.
        """
        chosen = to_numpy(routing.experts)
        inside = np.zeros(logits.shape[-1], bool)
        inside[resident] = True
        taken, substituted, kl = chosen, 0, 0.0
        affected = np.flatnonzero(~inside[chosen].all(axis=1))
        if len(affected):
            values = to_numpy(logits).astype(np.float64)
            taken = chosen.copy()
            for row in affected:
                taken[row], count = substitute(values[row], chosen[row], inside, self.fraction)
                if count:
                    substituted += count
                    kl += _log_mass(values[row], chosen[row]) - _log_mass(values[row], taken[row])
        self._count(layer, chosen.shape, substituted, kl)
        if not substituted:
            return routing
        changed = (taken != chosen).any(axis=1)
        weights = np.array(to_numpy(routing.weights))
        weights[changed] = self._weights(values[changed], taken[changed])
        union = None
        if routing.union is not None:
            union = self.backend.index(_union(taken, routing.union.shape[0]))
        index = self.backend.index
        return replace(routing, experts=index(taken), weights=index(weights), union=union)

    def _weights(self, values: np.ndarray, taken: np.ndarray) -> np.ndarray:
        """float32 [rows, top_k] of the experts taken."""
        scores = np.take_along_axis(values, taken.astype(np.int64), axis=1)
        peak = values.max(axis=1, keepdims=True)
        whole = scores if self.normalize else values
        total = np.exp(whole - peak).sum(axis=1, keepdims=True)
        return (np.exp(scores - peak) / total).astype(np.float32)

    def _count(self, layer: int, shape: tuple[int, ...], substituted: int, kl: float) -> None:
        before = self._counts.get(layer, LayerSubstitutions(layer, 0, 0, 0, 0.0))
        self._counts[layer] = LayerSubstitutions(
            layer,
            before.rows + shape[0],
            before.choices + shape[0] * shape[1],
            before.substituted + substituted,
            before.kl + kl,
        )


def substitute(
    logits: np.ndarray, chosen: np.ndarray, inside: np.ndarray, fraction: float
) -> tuple[np.ndarray, int]:
    """One row: the experts taken, by falling logit as routing orders them, and how many are new.

    logits float64 [experts], chosen int [top_k], inside bool [experts]: in memory.
    """
    if np.isnan(logits).any():
        return chosen, 0
    scores = logits[chosen]
    spread = scores.max() - scores.min()
    margin = fraction * (spread if spread >= FLAT else abs(scores.max()) + FLAT)
    free = inside & (logits >= scores.min() - margin)
    free[chosen] = False
    candidates = np.flatnonzero(free)
    candidates = candidates[np.argsort(-logits[candidates], kind="stable")]
    taken, count = chosen.copy(), 0
    absent = np.flatnonzero(~inside[chosen])
    # Routing orders a row by falling logit: from its end, the weakest come first.
    for at in absent[::-1]:
        if count == len(candidates) or logits[candidates[count]] < scores[at] - margin:
            break
        taken[at] = candidates[count]
        count += 1
    order = np.lexsort((taken, -logits[taken]))
    return taken[order], count


def _log_mass(logits: np.ndarray, experts: np.ndarray) -> float:
    """ln of the softmax mass of some experts, but for the softmax's common divisor."""
    peak = logits.max()
    return float(np.log(np.exp(logits[experts] - peak).sum()))


def _union(taken: np.ndarray, length: int) -> np.ndarray:
    """As Routing has it: int32 [length, 2], each expert used and the mask of its rows."""
    union = np.zeros((length, 2), np.int32)
    union[:, 0] = -1
    for at, expert in enumerate(np.unique(taken)):
        rows = np.flatnonzero((taken == expert).any(axis=1))
        mask = np.bitwise_or.reduce(np.left_shift(np.uint32(1), rows.astype(np.uint32)))
        union[at] = expert, np.array(mask, np.uint32).view(np.int32)
    return union
