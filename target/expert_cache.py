"""ExpertCache: the experts in memory. Pinned layers hold all of theirs, others share LRU slots.

A layer asks for the experts its rows need with `waves` and gets them in one wave, or in several
when the slots do not hold them all at once. Experts of a live wave are never evicted. Recency
changes only when an expert is loaded and in `touch`, which commit calls: a verify pass that is
thrown away leaves the order of what was resident as it was.

Layers whose experts differ in shape or packing cannot share slots; each kind gets its own group.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array, concatenate, to_numpy
from specdec.kernels.experts import ExpertWeights
from specdec.target.expert_bank import ExpertBank
from specdec.target.expert_store import ExpertStore
from specdec.target.pins import share_slots
from specdec.target.store import Geometry

UNCOUNTED = 4096  # uses of pinned layers that are counted together


@dataclass(frozen=True)
class LayerCounters:
    """What one layer asked of the cache since the counters were reset.

    hits, misses: experts asked for with `waves` (each once per call) that were, or were not,
        resident when asked. A pinned layer used through `bank` counts what `count_hits` is told.
    bytes_read: bytes that read calls returned for this layer, those of a failed wave included.
    """

    layer: int
    pinned: bool
    hits: int
    misses: int
    bytes_read: int


class Wave(NamedTuple):
    """Experts that are resident together.

    table: int32 [experts of the layer], the slot of each expert of this wave, -1 for all others.
    experts: int32, ascending.
    """

    bank: ExpertWeights
    table: np.ndarray
    experts: np.ndarray


class _Group:
    """Slots for layers of one geometry: bank, owners and recency."""

    def __init__(self, geometry: Geometry, slots: int, dtype: mx.Dtype) -> None:
        self.bank = ExpertBank(geometry, slots, dtype)
        self.owner_layer = np.full(slots, -1, np.int32)  # -1: the slot is empty
        self.owner_expert = np.full(slots, -1, np.int32)
        self.used = np.full(slots, -1, np.int64)  # larger is more recent; -1: empty, goes first

    def victims(self, count: int, live: np.ndarray) -> np.ndarray:
        """The `count` least recently used slots that are not live: empty ones, then the oldest."""
        order = np.argsort(self.used, kind="stable")
        free = order[~np.isin(order, live)]
        assert len(free) >= count
        return free[:count]


class ExpertCache:
    """Resident experts of all MoE layers."""

    def __init__(
        self, store: ExpertStore, pinned: Sequence[int], slots: int, dtype: mx.Dtype
    ) -> None:
        """Allocate the banks.

        pinned: layers that will hold all their experts once `load_pinned` ran.
        slots: experts that all other layers hold together; at most as many as they have are made.
        dtype: of scales, biases and dense weights in memory; other float dtypes on disk are
            converted while reading.
        PlanError when there are fewer slots than kinds of unpinned layers.
        """
        assert set(pinned) <= set(store.layers)
        self.store = store
        experts = store.num_experts
        self._pinned = {
            layer: ExpertBank(store.geometry(layer), experts, dtype) for layer in sorted(pinned)
        }
        unpinned = [layer for layer in store.layers if layer not in self._pinned]
        kinds = list(dict.fromkeys(store.geometry(layer) for layer in unpinned))
        sizes = [experts * sum(store.geometry(i) == kind for i in unpinned) for kind in kinds]
        shares = share_slots(slots, sizes) if kinds else ()
        groups = {
            kind: _Group(kind, share, dtype) for kind, share in zip(kinds, shares, strict=True)
        }
        self._groups = {layer: groups[store.geometry(layer)] for layer in unpinned}
        self._tables = {layer: np.full(experts, -1, np.int32) for layer in unpinned}
        self.slots = sum(shares)
        self.nbytes = sum(bank.nbytes for bank in self._pinned.values()) + sum(
            group.bank.nbytes for group in groups.values()
        )
        self._tick = 0
        self.reset_counters()

    def load_pinned(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Read all experts of the pinned layers; on_progress(bytes read, bytes in all)."""
        layers = list(self._pinned)
        total = sum(info.nbytes for layer in layers for info in self.store.infos(layer))
        done = 0
        for layer in layers:
            for index in self.store.reading_order(layer):
                view = self._pinned[layer].views[index]
                count = self.store.read(layer, index, 0, view)
                self._bytes_read[layer] += count
                done += count
                if on_progress is not None:
                    on_progress(done, total)

    def is_pinned(self, layer: int) -> bool:
        return layer in self._pinned

    @property
    def all_pinned(self) -> bool:
        return not self._groups

    def bank(self, layer: int) -> ExpertWeights:
        """The bank the layer's slots index; a pinned layer has expert e in slot e."""
        if layer in self._pinned:
            return self._pinned[layer].weights
        return self._groups[layer].bank.weights

    def waves(self, layer: int, experts: np.ndarray) -> Iterator[Wave]:
        """Make experts resident, in as many waves as the slots demand: one if they fit.

        experts: int [n], ids; repeated ids count once. Resident ones come in the first wave. The
        missing ones of a wave are read together, by file and offset.
        Everything that used the cache must be evaluated before this is called and before the next
        wave is taken. ExpertReadError when a read fails: the experts of that wave that were to be
        loaded are then absent, everything else is as it was, and asking again is allowed.
        """
        needed = np.unique(experts).astype(np.int32)
        if layer in self._pinned:
            self._hits[layer] += len(needed)
            table = np.full(self.store.num_experts, -1, np.int32)
            table[needed] = needed
            yield Wave(self._pinned[layer].weights, table, needed)
            return
        resident = self._tables[layer][needed] >= 0
        hits, missing = needed[resident], needed[~resident]
        self._hits[layer] += len(hits)
        self._misses[layer] += len(missing)
        room = self._groups[layer].bank.slots - len(hits)
        first, missing = missing[:room], missing[room:]
        yield self._wave(layer, hits, first)
        while len(missing):
            room = self._groups[layer].bank.slots
            first, missing = missing[:room], missing[room:]
            yield self._wave(layer, missing[:0], first)

    def resident(self, layer: int) -> np.ndarray:
        """Ids of the layer's experts that are in memory, int32, ascending."""
        if layer in self._pinned:
            return np.arange(self.store.num_experts, dtype=np.int32)
        return np.flatnonzero(self._tables[layer] >= 0).astype(np.int32)

    def count_hits(self, layer: int, experts: Array) -> None:
        """One pass used these experts of a pinned layer without asking: each counts as one hit.

        Counted later: reading a layer's routing back would cost the GPU its head start.
        """
        assert layer in self._pinned
        self._uncounted.append((layer, experts))
        if len(self._uncounted) >= UNCOUNTED:
            self._count()

    def touch(self, layer: int, experts: np.ndarray) -> None:
        """Mark experts as just used, the highest id last; absent ones are passed over."""
        if layer in self._pinned:
            return
        slots = self._tables[layer][np.unique(experts)]
        self._mark(self._groups[layer], slots[slots >= 0])

    def counters(self) -> tuple[LayerCounters, ...]:
        """Per MoE layer, ascending."""
        self._count()
        return tuple(
            LayerCounters(
                layer,
                self.is_pinned(layer),
                self._hits[layer],
                self._misses[layer],
                self._bytes_read[layer],
            )
            for layer in self.store.layers
        )

    def reset_counters(self) -> None:
        self._uncounted: list[tuple[int, Array]] = []
        self._hits = dict.fromkeys(self.store.layers, 0)
        self._misses = dict.fromkeys(self.store.layers, 0)
        self._bytes_read = dict.fromkeys(self.store.layers, 0)

    def _count(self) -> None:
        """Count the hits of pinned layers, read back all at once."""
        if self._uncounted:
            layers, used = zip(*self._uncounted, strict=True)
            flat = to_numpy(concatenate([experts.reshape(-1) for experts in used]))
            ends = np.cumsum([experts.size for experts in used])
            for layer, ids in zip(layers, np.split(flat, ends[:-1]), strict=True):
                self._hits[layer] += len(set(ids.tolist()))
            self._uncounted = []

    def _wave(self, layer: int, hits: np.ndarray, missing: np.ndarray) -> Wave:
        """Load the missing experts beside the hits."""
        group, resident = self._groups[layer], self._tables[layer]
        if len(missing):
            slots = group.victims(len(missing), resident[hits])
            self._evict(group, slots)
            self._read(layer, missing, slots)
            # Only now do the slots hold experts: an error above leaves them empty.
            group.owner_layer[slots] = layer
            group.owner_expert[slots] = missing
            resident[missing] = slots
            self._mark(group, slots)
        wave = np.union1d(hits, missing)
        table = np.full(self.store.num_experts, -1, np.int32)
        table[wave] = resident[wave]
        return Wave(group.bank.weights, table, wave)

    def _evict(self, group: _Group, slots: np.ndarray) -> None:
        for slot in slots[group.owner_layer[slots] >= 0]:
            self._tables[int(group.owner_layer[slot])][group.owner_expert[slot]] = -1
        group.owner_layer[slots] = group.owner_expert[slots] = -1
        group.used[slots] = -1

    def _read(self, layer: int, experts: np.ndarray, slots: np.ndarray) -> None:
        """Read experts into slots of the layer's bank, ascending by file and offset."""
        bank = self._groups[layer].bank
        # Tensors do not overlap, and experts ascend within each.
        for index in self.store.reading_order(layer):
            for expert, slot in zip(experts.tolist(), slots.tolist(), strict=True):
                view = bank.views[index][slot : slot + 1]
                self._bytes_read[layer] += self.store.read(layer, index, expert, view)

    def _mark(self, group: _Group, slots: np.ndarray) -> None:
        group.used[slots] = np.arange(self._tick, self._tick + len(slots))
        self._tick += len(slots)
