"""Admission: which experts of a group of layers get slots, when, and whose. Decisions alone.

A pass that asks a layer gets its experts in waves: those that are there, while the missing ones are
read, then those. What is loaded ahead of any asking goes to empty slots, and to those of experts
that are less likely to be asked for next than the guess is (target/slots.py).

The cache reads (target/expert_loads.py) as it is decided here, and the simulation of a logged run
pretends to: a Loader each.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from specdec.target.slots import SlotTable

_NONE = np.zeros(0, np.int32)


@dataclass(eq=False)
class Load:
    """Experts of one layer that are being read into slots.

    ahead: it was begun before anybody asked. early: nobody has asked since. request: how far the
        reads are; None where they have not begun.
    """

    layer: int
    experts: np.ndarray
    ahead: bool = False
    early: bool = False
    slots: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    request: Any = None


class Loader(Protocol):
    """Who does the loading; all loads reserve slots beside the live ones."""

    def begin(self, layer: int, experts: np.ndarray, live: np.ndarray) -> Load: ...

    def finish(self, load: Load) -> None:
        """Wait for a load; its slots are full."""

    def ahead(self, layer: int, experts: np.ndarray, live: np.ndarray, chance: float) -> None:
        """Begin to load experts one by one, in their order, once nothing else is to be read."""

    def early(self) -> list[Load]:
        """Loads ahead under way that nobody has asked for."""
        ...

    def hurry(self, load: Load) -> None:
        """A pass asks for what an early load brings."""

    def drop(self, load: Load) -> None:
        """Give an early load up."""


class Asked(NamedTuple):
    """What a pass asked a layer for: experts there, on their way, in no slot; ascending.

    early: how many of those there had been loaded ahead, and are asked for the first time.
    """

    layer: int
    hits: np.ndarray
    coming: np.ndarray
    missing: np.ndarray
    early: int


def portion(missing: int, room: int, live: int) -> int:
    """How many of the missing experts to load at once, `live` slots being computed with.

    All if there is room. What does not fit fills the room that live slots leave; beside none, half
    of it, so that the other half is read while this one is computed with.
    """
    if missing <= room:
        return missing
    return room if live else (room + 1) // 2


class Admission:
    """Of the layers that share the slots of one table."""

    def __init__(self, table: SlotTable, loader: Loader) -> None:
        self.table, self._loader = table, loader
        self._live = np.zeros(0, np.int64)  # slots of the request before

    def ask(self, layer: int, needed: np.ndarray) -> Asked:
        """needed: distinct ids, ascending."""
        slots = self.table.places(layer)[needed]
        there = self.table.full(slots)
        early = self.table.asked(layer, needed)
        return Asked(layer, needed[there], needed[~there & (slots >= 0)], needed[slots < 0], early)

    def waves(self, asked: Asked) -> Iterator[tuple[np.ndarray, bool]]:
        """Groups of experts (ids, ascending) that are resident together, and whether the next group
        may take their slots. Loads of the missing ones begin before the first is handed out; that
        is what was there, and may be none."""
        layer, hits, coming, missing, _ = asked
        hurried = [one for one in self._early(layer) if np.isin(one.experts, coming).any()]
        for one in hurried:
            self._loader.hurry(one)
        load, rest = self._begin(layer, missing, self._slots(layer, hits, coming))
        yield hits, len(hits) > 0 and len(rest) > 0
        for one in hurried:
            self._loader.finish(one)
        while len(load.experts) or len(coming) or len(rest):
            following = Load(layer, _NONE)
            if len(rest):
                live = self._slots(layer, coming, load.experts)
                following, rest = self._begin(layer, rest, live)
            self._loader.finish(load)
            wave = np.union1d(coming, load.experts).astype(np.int32)
            if len(wave):
                yield wave, len(rest) + len(following.experts) > 0
            load, coming = following, _NONE

    def ahead(self, layer: int, experts: np.ndarray, chance: float, most: int) -> np.ndarray:
        """Begin to load experts that may be asked for soon, the likeliest first; those begun.

        chance: that one is asked for by the next pass. At most `most` of them.
        """
        ids = np.asarray(experts, np.int32)
        ids = ids[self.table.places(layer)[ids] < 0]
        if not len(ids) or most < 1:
            return _NONE
        ids = np.array(list(dict.fromkeys(ids.tolist())), np.int32)
        ids = ids[: min(most, self.table.room(layer, self._live, chance))]
        if len(ids):
            self._loader.ahead(layer, ids, self._live, chance)
        return ids

    def _begin(self, layer: int, missing: np.ndarray, live: np.ndarray) -> tuple[Load, np.ndarray]:
        """Begin to load a portion of what is missing: the load, and what is left."""
        room = self.table.room(layer, live)
        if len(missing) and room == 0 and not len(live):
            for load in self._early():  # they make way where there would be no room at all
                self._loader.drop(load)
            room = self.table.room(layer, live)
            assert room > 0
        count = portion(len(missing), room, len(live))
        load = self._loader.begin(layer, missing[:count], live)
        self._live = np.concatenate([live, load.slots])
        return load, missing[count:]

    def _early(self, layer: int | None = None) -> list[Load]:
        layers = self.table.layers if layer is None else (layer,)
        return [load for load in self._loader.early() if load.layer in layers]

    def _slots(self, layer: int, *experts: np.ndarray) -> np.ndarray:
        return self.table.places(layer)[np.concatenate(experts)]
