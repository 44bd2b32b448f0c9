"""SlotTable: which expert is in which slot of a bank, and who has to go. Bookkeeping alone.

A slot is empty, reserved (a read is filling it) or full. Only full slots are ever looked up: what
is reserved becomes full by `fill`, after its last byte. `rebuild` forgets everything reserved, and
puts right what an interrupt amid any of these left half done.

Who may be evicted for a layer: its own experts, and of another layer as many as it has beyond its
quota; never a slot that the caller names as live. Who is, says the policy.

For a guess, less may be: no other guess that still waits for its layer to ask, and no expert that
is as likely to be asked for next. One that its layer's last n requests did not name is asked for by
the next one with a chance of 1 / (n + 2), by the rule of succession.
"""

from collections.abc import Mapping

import numpy as np

from specdec.target.policy import Policy

_NONE = np.zeros(0, np.int64)
_NEVER = -(1 << 40)  # a request long before the first


class SlotTable:
    """Slots that layers of one geometry share."""

    def __init__(self, slots: int, experts: int, quotas: Mapping[int, int], policy: Policy) -> None:
        """experts: of each layer. quotas: layer -> slots it cannot lose to others."""
        assert slots >= 1
        assert sum(quotas.values()) <= slots
        self.slots, self.layers, self.policy = slots, tuple(quotas), policy
        self.evictions = dict.fromkeys(quotas, 0)
        self.unused = dict.fromkeys(quotas, 0)  # of them, loaded ahead and never asked for
        self._quota = np.array([quotas[layer] for layer in self.layers])
        self._index = {layer: at for at, layer in enumerate(self.layers)}
        self._owner = np.full(slots, -1, np.int64)  # place of the layer in `layers`; -1: empty
        self._expert = np.full(slots, -1, np.int64)
        self._full = np.zeros(slots, bool)
        self._early = np.zeros(slots, bool)  # loaded ahead, and its layer has not asked since
        self._unused = np.zeros(slots, bool)  # loaded ahead, and nobody has asked for it
        self._requests = np.zeros(len(self.layers), np.int64)  # of each layer so far
        self._reserved = np.zeros(slots, np.int64)  # its layer's requests before the slot was taken
        self._asked = np.full(slots, _NEVER)  # the layer's request that last named the expert
        self._places = {layer: np.full(experts, -1, np.int32) for layer in self.layers}

    def places(self, layer: int) -> np.ndarray:
        """The slot of each expert of the layer, reserved ones included; -1: none. int32."""
        return self._places[layer]

    def full(self, slots: np.ndarray) -> np.ndarray:
        """Whether each slot is full; False for -1."""
        return self._full[slots] & (slots >= 0)

    def resident(self, layer: int) -> np.ndarray:
        """Experts of the layer in full slots, ascending."""
        return np.flatnonzero(self.full(self._places[layer])).astype(np.int32)

    def room(self, layer: int, live: np.ndarray = _NONE, chance: float | None = None) -> int:
        """How many experts of the layer could be loaded now beside the live slots; guesses where
        `chance` says how likely they are to be asked for next."""
        candidates = np.bincount(
            self._owner[self._candidates(layer, live, chance)], minlength=len(self.layers)
        )
        empty = int((self._owner < 0).sum())
        return empty + int(np.minimum(candidates, self._allowance(layer)).sum())

    def reserve(
        self,
        layer: int,
        experts: np.ndarray,
        live: np.ndarray = _NONE,
        chance: float | None = None,
    ) -> np.ndarray:
        """Slots for experts that are in none, others evicted for them; at most `room` experts."""
        free = np.flatnonzero(self._owner < 0)[: len(experts)]
        if len(free) < len(experts):
            candidates = self._candidates(layer, live, chance)
            victims = self._victims(layer, len(experts) - len(free), candidates)
            self._evict(victims)
            free = np.concatenate([free, victims])
        self._owner[free], self._expert[free] = self._index[layer], experts
        self._reserved[free] = self._requests[self._index[layer]]
        self._places[layer][experts] = free
        return free

    def fill(self, slots: np.ndarray, early: bool = False) -> None:
        """The experts of reserved slots have arrived; early: before anybody asked for them. If
        their layer has asked for others meanwhile, they wait for nothing any more."""
        self.policy.loaded(slots, self._keys(slots), early)
        self._unused[slots] = early
        self._early[slots] = early & (self._reserved[slots] == self._requests[self._owner[slots]])
        self._asked[slots] = _NEVER if early else self._requests[self._owner[slots]]
        self._full[slots] = True

    def release(self, slots: np.ndarray) -> None:
        """Reserved slots become empty; those that are empty already stay so."""
        for layer, expert in self._keys(slots[self._owner[slots] >= 0]):
            self._places[layer][expert] = -1
        self._owner[slots] = -1

    def asked(self, layer: int, experts: np.ndarray) -> int:
        """A pass asks the layer for experts: what was loaded ahead is like any other from now on.
        How many of the experts had been, and are asked for the first time."""
        at, places = self._index[layer], self._places[layer]
        self._requests[at] += 1
        wanted = places[experts]
        wanted = wanted[self.full(wanted)]
        served = int(self._unused[wanted].sum())
        self._unused[wanted] = False
        self._asked[wanted] = self._requests[at]
        self._early[places[self.full(places)]] = False
        return served

    def touch(self, layer: int, experts: np.ndarray) -> None:
        """Committed rows used experts, the highest id last; absent ones are passed over."""
        slots = self._places[layer][np.unique(experts)]
        slots = slots[self.full(slots)]
        if len(slots):
            self.policy.used(slots)

    def rebuild(self) -> None:
        """Forget what is reserved; what is full stays."""
        self._owner[~self._full] = -1
        for places in self._places.values():
            places[:] = -1
        for slot in np.flatnonzero(self._full).tolist():
            self._places[self.layers[self._owner[slot]]][self._expert[slot]] = slot

    def _allowance(self, layer: int) -> np.ndarray:
        """How many slots each layer may lose for `layer`."""
        held = np.bincount(self._owner[self._owner >= 0], minlength=len(self.layers))
        allowance = np.maximum(held - self._quota, 0)
        allowance[self._index[layer]] = self.slots
        return allowance

    def _candidates(self, layer: int, live: np.ndarray, chance: float | None) -> np.ndarray:
        mask = self._full & (self._allowance(layer)[self._owner] > 0)
        mask[live] = False
        if chance is not None:
            since = self._requests[self._owner] - self._asked
            mask &= ~self._early & (chance * (since + 2) > 1)
        return np.flatnonzero(mask)

    def _victims(self, layer: int, count: int, candidates: np.ndarray) -> np.ndarray:
        """The first `count` by the policy, of each layer as many as it may lose."""
        ranked = self.policy.rank(candidates)
        # What was loaded ahead and waits to be used goes last.
        ranked = ranked[np.argsort(self._early[ranked], kind="stable")]
        owners = self._owner[ranked]
        order = np.argsort(owners, kind="stable")
        counts = np.bincount(owners, minlength=len(self.layers))
        nth = np.empty(len(ranked), np.int64)  # of its layer
        nth[order] = np.arange(len(ranked)) - np.repeat(np.cumsum(counts) - counts, counts)
        victims = ranked[nth < self._allowance(layer)[owners]][:count]
        assert len(victims) == count, "more experts than there is room for"
        return victims

    def _evict(self, slots: np.ndarray) -> None:
        self._full[slots] = False  # first: from here on nobody believes in them
        keys = self._keys(slots)
        self.policy.evicted(slots, keys)
        for layer, expert in keys:
            self._places[layer][expert] = -1
            self.evictions[layer] += 1
        for layer, _ in self._keys(slots[self._unused[slots]]):
            self.unused[layer] += 1
        self._unused[slots] = False
        self._owner[slots] = -1

    def _keys(self, slots: np.ndarray) -> list[tuple[int, int]]:
        owners, experts = self._owner[slots].tolist(), self._expert[slots].tolist()
        return [(self.layers[owner], e) for owner, e in zip(owners, experts, strict=True)]
