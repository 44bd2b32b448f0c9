"""Policy: which expert leaves its slot first. Two exist, chosen by name.

lru: the one whose last use by a committed row, or whose loading, is longest ago. Close to optimal
    on Qwen3's routing (see docs/design.md).
s3-fifo: loaded experts wait in a small queue and leave it first, unless committed rows came back
    to them after the pass that loaded them; those move to the main queue, where each use saves
    them from one eviction. Made for experts that one rejected branch of a tree asked for and
    nobody again (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023).

Policies see slots, and keys (layer, expert) only to recognize what comes back. They never say
whether a slot may be evicted: target/slots.py does.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np

POLICIES = ("lru", "s3-fifo")
Key = tuple[int, int]


class Policy(Protocol):
    """Slots are int arrays; their order counts where several things happen at once."""

    def loaded(self, slots: np.ndarray, keys: Sequence[Key], early: bool) -> None:
        """Experts came into slots; `early`: nobody has asked for them yet."""
        ...

    def used(self, slots: np.ndarray) -> None:
        """Committed rows used what is in these slots."""
        ...

    def rank(self, slots: np.ndarray) -> np.ndarray:
        """The slots, the first to be evicted first. Changes nothing."""
        ...

    def evicted(self, slots: np.ndarray, keys: Sequence[Key]) -> None:
        """These left, in this order."""
        ...


def make_policy(name: str, slots: int) -> Policy:
    """A policy by its name, for a bank of so many slots."""
    assert name in POLICIES
    return Lru(slots) if name == "lru" else S3Fifo(slots)


class Lru:
    """Least recently used first."""

    def __init__(self, slots: int) -> None:
        self._used = np.full(slots, -1, np.int64)  # larger is more recent
        self._tick = 0

    def loaded(self, slots: np.ndarray, keys: Sequence[Key], early: bool) -> None:
        if early:
            self._used[slots] = -1
        else:
            self.used(slots)

    def used(self, slots: np.ndarray) -> None:
        self._used[slots] = np.arange(self._tick, self._tick + len(slots))
        self._tick += len(slots)

    def rank(self, slots: np.ndarray) -> np.ndarray:
        return slots[np.argsort(self._used[slots], kind="stable")]

    def evicted(self, slots: np.ndarray, keys: Sequence[Key]) -> None:
        self._used[slots] = -1


class S3Fifo:
    """A small queue before a main one, and the keys of what left the small one unused."""

    MOST_USES = 3
    SMALL_SHARE = 10  # the small queue may keep one slot in so many

    def __init__(self, slots: int) -> None:
        self._small = np.zeros(slots, bool)
        self._uses = np.zeros(slots, np.int64)  # since it entered its queue
        self._entered = np.full(slots, -1, np.int64)
        self._ghosts: OrderedDict[Key, None] = OrderedDict()
        self._tick = 0

    def loaded(self, slots: np.ndarray, keys: Sequence[Key], early: bool) -> None:
        for slot, key in zip(slots.tolist(), keys, strict=True):
            self._small[slot] = early or key not in self._ghosts
            self._ghosts.pop(key, None)
        self._enter(slots)
        self._uses[slots] = 0

    def used(self, slots: np.ndarray) -> None:
        self._uses[slots] = np.minimum(self._uses[slots] + 1, self.MOST_USES)

    def rank(self, slots: np.ndarray) -> np.ndarray:
        # The pass that loads an expert uses it once: that alone is no reason to stay.
        small = self._small[slots] & (self._uses[slots] <= 1)
        small_first = int(self._small.sum()) * self.SMALL_SHARE >= len(self._small)
        queue = ~small if small_first else small
        uses = np.where(small, 0, self._uses[slots])
        return slots[np.lexsort((self._entered[slots], uses, queue))]

    def evicted(self, slots: np.ndarray, keys: Sequence[Key]) -> None:
        for slot, key in zip(slots.tolist(), keys, strict=True):
            if self._small[slot]:
                self._ghosts[key] = None
        while len(self._ghosts) > len(self._small):
            self._ghosts.popitem(last=False)
        small = self._small[slots]
        for queue in (True, False):
            left = slots[small == queue]
            if len(left):
                self._pass_over(queue, int(self._entered[left].max()))
        self._small[slots], self._uses[slots], self._entered[slots] = False, 0, -1

    def _pass_over(self, small: bool, entered: int) -> None:
        """What had entered a queue before the evicted ones and stays pays with a use."""
        older = (self._small == small) & (self._entered >= 0) & (self._entered < entered)
        spared = np.flatnonzero(older & (self._uses > (1 if small else 0)))
        spared = spared[np.argsort(self._entered[spared])]
        self._uses[spared] = 0 if small else self._uses[spared] - 1
        self._small[spared] = False
        self._enter(spared)

    def _enter(self, slots: np.ndarray) -> None:
        self._entered[slots] = np.arange(self._tick, self._tick + len(slots))
        self._tick += len(slots)
