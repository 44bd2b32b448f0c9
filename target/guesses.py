"""Guesses: how many experts are worth reading ahead for a layer, and how often they were right."""

from collections.abc import Sequence

import numpy as np

LIKELY = 0.5  # the chance of a guess about which nothing is known
MEMORY = 1 / 16  # weight of the latest pass in the mean of what a layer misses
RARELY = 0.05  # misses per pass: a layer that has no more is left alone
FORGET = 512  # guesses of a way, of which half are forgotten then


class Guesses:
    """Of the layers that are not pinned. A way is where guesses come from."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._right: dict[str, float] = {}  # by way, of those read ahead
        self._made: dict[str, float] = {}
        self._missed = dict.fromkeys(layers, 0.0)  # mean per pass of a tree
        self._begun: dict[int, tuple[str, set[int]]] = {}  # by layer, until it asks

    def most(self, layer: int) -> int:
        """How many more to read ahead before the layer asks: as many as it lately missed."""
        begun = self._begun[layer][1] if layer in self._begun else ()
        return int(np.ceil(self._missed[layer] - RARELY)) - len(begun)

    def chance(self, way: str) -> float:
        """That an expert which was read ahead is asked for next."""
        return (self._right.get(way, 0.0) + LIKELY) / (self._made.get(way, 0.0) + 1)

    def begun(self, layer: int, way: str, experts: np.ndarray) -> None:
        """Experts that are being read ahead."""
        before = self._begun[layer][1] if layer in self._begun else set()
        self._begun[layer] = way, before | set(experts.tolist())

    def asked(self, layer: int, needed: np.ndarray, missing: int, counts: bool) -> None:
        """The layer asks. missing: experts that are in no slot, nor on their way to one. counts:
        whether guesses are made for such passes."""
        way, begun = self._begun.pop(layer, ("", set()))
        served = len(begun.intersection(needed.tolist()))
        if begun:
            if self._made.get(way, 0.0) >= FORGET:
                self._made[way], self._right[way] = self._made[way] / 2, self._right[way] / 2
            self._made[way] = self._made.get(way, 0.0) + len(begun)
            self._right[way] = self._right.get(way, 0.0) + served
        if counts:
            self._missed[layer] += MEMORY * (missing + served - self._missed[layer])
