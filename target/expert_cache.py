"""ExpertCache: the experts in memory. Pinned layers hold all of theirs, others share slots.

A layer asks for the experts its rows need with `waves`, which begins to read all missing ones at
once and hands out those that are there meanwhile. Experts of a live wave are never evicted. What
committed rows used is told by `touch`, which commit calls: a verify pass that is thrown away, or a
row that is rejected, is no use. `prefetch` loads ahead of any asking. Who gets a slot and when is
decided in target/admission.py.

Layers whose experts differ in shape or packing cannot share slots; each kind gets its own group.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array
from specdec.kernels.experts import ExpertWeights
from specdec.target.admission import Admission
from specdec.target.expert_bank import ExpertBank
from specdec.target.expert_counters import LayerCounters, PinnedHits
from specdec.target.expert_loads import ExpertLoads, Group
from specdec.target.expert_reader import ExpertReader
from specdec.target.guesses import LIKELY
from specdec.target.pins import share_slots
from specdec.target.policy import make_policy
from specdec.target.quotas import protected_layers, quotas, union
from specdec.target.read_queue import ReadCounters
from specdec.target.slots import SlotTable
from specdec.target.store import Store
from specdec.target.streaming import Streaming

PROGRESS_SECONDS = 0.1


class Wave(NamedTuple):
    """Experts that are resident together.

    table: int32 [experts of the layer], the slot of each expert of this wave, -1 for all others.
    experts: int32, ascending.
    fleeting: the next wave may fill these slots anew: what uses them must be evaluated before.
    """

    bank: ExpertWeights
    table: np.ndarray
    experts: np.ndarray
    fleeting: bool = False


class ExpertCache:
    """Resident experts of all MoE layers."""

    def __init__(
        self,
        store: Store,
        pinned: Sequence[int],
        slots: int,
        dtype: mx.Dtype,
        streaming: Streaming | None = None,
    ) -> None:
        """Allocate the banks and open the files for reading.

        pinned: layers that will hold all their experts once `load_pinned` ran.
        slots: experts that all other layers hold together; at most as many as they have are made.
        dtype: of scales, biases and dense weights in memory; other float dtypes on disk are
            converted while reading.
        PlanError when there are fewer slots than kinds of unpinned layers; CheckpointError where
        direct reads cannot be had.
        """
        assert set(pinned) <= set(store.layers)
        self.store = store
        self.streaming = how = streaming or Streaming()
        experts, top_k = store.num_experts, store.config.top_k
        self._pinned = {i: ExpertBank(store.geometry(i), experts, dtype) for i in sorted(pinned)}
        unpinned = [layer for layer in store.layers if layer not in self._pinned]
        kinds = list(dict.fromkeys(store.geometry(layer) for layer in unpinned))
        members = [[i for i in unpinned if store.geometry(i) == kind] for kind in kinds]
        shares = share_slots(slots, [experts * len(layers) for layers in members]) if kinds else ()
        protected = protected_layers(how.protect, store.layers)
        wanted = union(experts, top_k, how.rows)
        self._groups: dict[int, Group] = {}
        for kind, layers, share in zip(kinds, members, shares, strict=True):
            quota = quotas(share, layers, wanted, top_k, protected)
            table = SlotTable(share, experts, quota, make_policy(how.policy, share))
            group = Group(ExpertBank(kind, share, dtype), table)
            self._groups |= dict.fromkeys(layers, group)
        groups = {id(group): group for group in self._groups.values()}.values()
        self.slots = sum(shares)
        self.nbytes = sum(bank.nbytes for bank in self._pinned.values())
        self.nbytes += sum(group.bank.nbytes for group in groups)
        self._tables = [group.table for group in groups]
        self._reader = ExpertReader(store.files, how.queue_depth, how.direct)
        self._counters = {i: LayerCounters(i, i in self._pinned) for i in store.layers}
        self._loads = ExpertLoads(store, self._reader, self._groups, self._counters)
        admissions = {id(table): Admission(table, self._loads) for table in self._tables}
        self._admissions = {i: admissions[id(g.table)] for i, g in self._groups.items()}
        self._asking: object | None = None  # stands for the request whose waves are being taken
        # Told of each request before its reads begin: layer, experts asked for, those missing.
        self.observers: list[Callable[[int, np.ndarray, np.ndarray], None]] = []
        self.reset_counters()

    def load_pinned(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Read all experts of the pinned layers; on_progress(bytes read, bytes in all)."""
        each = range(self.store.num_experts)
        sizes = {i: len(each) * self.store.geometry(i).bytes_on_disk for i in self._pinned}
        done, total = 0, sum(sizes.values())
        for layer, bank in self._pinned.items():
            request = self._reader.submit(self._loads.slices(layer, each, bank, each))
            try:
                while not request.wait(PROGRESS_SECONDS):
                    if on_progress is not None:
                        on_progress(done + min(request.bytes_read, sizes[layer]), total)
            except BaseException:
                self._reader.drain()
                raise
            bank.filled()
            self._counters[layer].bytes_read += request.bytes_read
            done += sizes[layer]
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
        """Make experts resident: those that are, while the missing ones are read, then those.

        experts: int [n], ids; repeated ids count once. Reads of all missing experts, or of as many
        as the slots hold, are submitted together and before the first wave is handed out; when the
        slots do not hold them all at once there are more waves, each read while the one before is
        computed. The first wave has no experts where none were there: time to compute what needs
        none.
        Everything that used the cache must be evaluated before this is called, and a fleeting wave
        before the next one is taken. ExpertReadError when a read fails: the experts that were to
        be loaded are then absent, everything else is as it was, and asking again is allowed.
        """
        needed = np.unique(experts).astype(np.int32)
        counters = self._counters[layer]
        counters.passes += 1
        if layer in self._pinned:
            counters.hits += len(needed)
            table = np.full(self.store.num_experts, -1, np.int32)
            table[needed] = needed
            yield Wave(self._pinned[layer].weights, table, needed)
            return
        self._loads.recover()
        self._loads.collect()
        self._loads.asked(layer, needed)
        self._asking = asking = object()
        try:
            yield from self._waves(layer, needed, counters)
        finally:
            if self._asking is asking:
                self._asking = None

    def prefetch(
        self, layer: int, experts: np.ndarray, chance: float = LIKELY, most: int | None = None
    ) -> np.ndarray:
        """Begin to load experts that may be asked for soon, the likeliest first; those begun.

        They go to empty slots and to those that the policy would clear first, quotas respected;
        never to slots of the request before, nor of other guesses, nor of experts as likely to be
        asked for next (target/slots.py). chance: that one of these is. At most `most` of them.
        Reads wait until nothing urgent does. They count as used only when a committed row uses
        them, and stay until their layer has asked once. One that cannot be read is not there.
        """
        if layer in self._pinned:
            return np.zeros(0, np.int32)
        if self._asking is None:  # else a pass waits for loads, which are all in order
            self._loads.recover()
        self._loads.collect()
        most = self.store.num_experts if most is None else most
        return self._admissions[layer].ahead(layer, experts, chance, most)

    def resident(self, layer: int) -> np.ndarray:
        """Ids of the layer's experts that are in memory, int32, ascending."""
        if layer in self._pinned:
            return np.arange(self.store.num_experts, dtype=np.int32)
        return self._groups[layer].table.resident(layer)

    def touch(self, layer: int, experts: np.ndarray) -> None:
        """Committed rows used these experts, the highest id last; absent ones are passed over."""
        if layer not in self._pinned:
            self._groups[layer].table.touch(layer, experts)

    def count_hits(self, chosen: Mapping[int, Array]) -> None:
        """One pass used these experts [rows, top_k] of pinned layers without asking: each counts
        as one hit."""
        rows, top_k = next(iter(chosen.values())).shape if chosen else (0, 0)
        if rows == 1:  # whatever they are
            for layer in chosen:
                self._counters[layer].hits += top_k
        elif self._pinned_hits.add(chosen):
            self._count_pinned()

    def count_synchronization(self, layer: int) -> None:
        """The host waited for results of this layer."""
        self._counters[layer].synchronizations += 1

    def counters(self) -> tuple[LayerCounters, ...]:
        """Per MoE layer, ascending."""
        self._count_pinned()
        for table in self._tables:
            for layer, count in table.evictions.items():
                self._counters[layer].evictions = count
        return tuple(
            replace(one, wasted_bytes=one.wasted_bytes + self._left_unused(one.layer))
            for one in self._counters.values()
        )

    def slot_requests(self) -> tuple[int, int]:
        """Hits and misses of all unpinned layers so far."""
        if self.all_pinned:
            return 0, 0
        unpinned = [one for one in self._counters.values() if not one.pinned]
        return sum(one.hits for one in unpinned), sum(one.misses for one in unpinned)

    def waited(self) -> tuple[int, float]:
        """Misses of all unpinned layers so far, and seconds waited for their reads."""
        if self.all_pinned:
            return 0, 0.0
        layers = self._counters.values()
        return sum(i.misses for i in layers), sum(i.stall_seconds for i in layers)

    def foreseen(self) -> int:
        """Experts so far that were there when asked for because they had been loaded ahead."""
        return sum(one.early_hits for one in self._counters.values())

    def reads(self) -> ReadCounters:
        """What the disk delivered since the counters were reset."""
        return self._reader.counters()

    def reset_counters(self) -> None:
        self._pinned_hits = PinnedHits()
        for layer, counters in self._counters.items():
            vars(counters).update(vars(LayerCounters(layer, layer in self._pinned)))
        for table in self._tables:
            table.evictions = dict.fromkeys(table.layers, 0)
            table.unused = dict.fromkeys(table.layers, 0)
        self._reader.reset_counters()

    def _waves(self, layer: int, needed: np.ndarray, counters: LayerCounters) -> Iterator[Wave]:
        admission = self._admissions[layer]
        asked = admission.ask(layer, needed)
        counters.hits += len(asked.hits)
        counters.misses += len(needed) - len(asked.hits)
        counters.early_hits += asked.early
        for observer in self.observers:
            observer(layer, needed, asked.missing)
        for ids, fleeting in admission.waves(asked):
            table = np.full(self.store.num_experts, -1, np.int32)
            table[ids] = self._groups[layer].table.places(layer)[ids]
            yield Wave(self.bank(layer), table, ids, fleeting)

    def _left_unused(self, layer: int) -> int:
        """Bytes of experts that were loaded ahead and evicted before anybody asked for them."""
        if layer in self._pinned:
            return 0
        unused = self._groups[layer].table.unused[layer]
        return unused * self.store.geometry(layer).bytes_on_disk

    def _count_pinned(self) -> None:
        for layer, count in self._pinned_hits.take():
            self._counters[layer].hits += count
