"""Counters of the expert cache: what each layer asked for, and what that cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from specdec.kernels.array import Array, concatenate, to_numpy

UNCOUNTED = 4096  # uses of pinned layers that are counted together


@dataclass
class LayerCounters:
    """What one layer asked of the cache since the counters were reset.

    hits, misses: experts asked for with `waves` (each once per call) that were, or were not,
        resident when asked. A pinned layer used through `bank` counts what `count_hits` is told.
    bytes_read: bytes that read calls returned for this layer, those of failed reads included.
    evictions: experts of this layer that had to leave their slots.
    stall_seconds: time in which the forward pass waited for this layer's reads.
    passes: calls of `waves`. synchronizations: times the host waited for results of this layer.
    early: experts that were begun to be read ahead of any asking (`prefetch`). early_hits: those of
        them that were there when first asked for, late: those still being read then, which count
        as misses. failed: those that could not be read, which are read again when asked for.
    early_bytes: bytes read ahead, part of bytes_read. wasted_bytes: those of them that were given
        up, failed, or left their slots without having been asked for.
    """

    layer: int
    pinned: bool
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    evictions: int = 0
    stall_seconds: float = 0.0
    passes: int = 0
    synchronizations: int = 0
    early: int = 0
    early_hits: int = 0
    late: int = 0
    failed: int = 0
    early_bytes: int = 0
    wasted_bytes: int = 0


class PinnedHits:
    """Experts that passes used of pinned layers, counted many at a time.

    Reading a layer's routing back at once would cost a GPU its head start.
    """

    def __init__(self) -> None:
        self._layers: list[int] = []
        self._used: list[Array] = []

    def add(self, chosen: Mapping[int, Array]) -> bool:
        """Note one pass's experts [rows, top_k] by layer; whether it is time to `take` them."""
        self._layers += chosen
        self._used += chosen.values()
        return len(self._used) >= UNCOUNTED

    def take(self) -> Sequence[tuple[int, int]]:
        """(layer, distinct experts) of every pass noted since the last call."""
        if not self._used:
            return ()
        rows = to_numpy(concatenate(self._used))
        passes = np.repeat(np.arange(len(self._used)), [len(experts) for experts in self._used])
        ids = np.unique(passes[:, None] * (int(rows.max()) + 1) + rows)
        counts = np.bincount(ids // (int(rows.max()) + 1), minlength=len(self._used))
        found = list(zip(self._layers, counts.tolist(), strict=True))
        self._layers, self._used = [], []
        return found
