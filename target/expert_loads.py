"""ExpertLoads: experts on their way from disk into the slots of a bank, as Admission decides.

`begin` reserves slots and submits one request for all of them, `finish` waits for it and only then
calls the slots full. Whatever ends a pass between the two, an error or an interrupt, leaves loads
behind; `recover` stops their reads before their slots are given to anybody else.

What is loaded ahead is one load per expert: each arrives, is given up or fails by itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from specdec.errors import ExpertReadError
from specdec.target.admission import Load
from specdec.target.expert_bank import ExpertBank
from specdec.target.expert_counters import LayerCounters
from specdec.target.expert_reader import ExpertReader
from specdec.target.read_plan import Slice
from specdec.target.read_queue import Request
from specdec.target.slots import SlotTable
from specdec.target.store import Store


@dataclass(frozen=True)
class Group:
    """The bank and the slots that layers of one geometry share."""

    bank: ExpertBank
    table: SlotTable


class ExpertLoads:
    """All loads under way."""

    def __init__(
        self,
        store: Store,
        reader: ExpertReader,
        groups: Mapping[int, Group],
        counters: Mapping[int, LayerCounters],
    ) -> None:
        self.store, self.reader, self.groups, self.counters = store, reader, groups, counters
        self._running: list[Load] = []
        self._broken = False

    def slices(
        self, layer: int, experts: Sequence[int], bank: ExpertBank, slots: Sequence[int]
    ) -> list[Slice]:
        """What to read to have the experts in these slots of a bank."""
        tensors = self.store.geometry(layer).tensors
        return [
            Slice(span, tensor.dtype, view[slot])
            for expert, slot in zip(experts, slots, strict=True)
            for span, tensor, view in zip(
                self.store.spans(layer, expert), tensors, bank.views, strict=True
            )
        ]

    def begin(self, layer: int, experts: np.ndarray, live: np.ndarray) -> Load:
        """Reserve slots beside the live ones and begin to read."""
        load = Load(layer, experts)
        if len(experts):
            self._running.append(load)
            load.slots = self.groups[layer].table.reserve(layer, experts, live)
            self._submit(load)
        return load

    def ahead(self, layer: int, experts: np.ndarray, live: np.ndarray, chance: float) -> None:
        """Reserve slots for guesses, and read them one by one once nothing urgent waits."""
        loads = [
            Load(layer, one, ahead=True, early=True) for one in np.split(experts, len(experts))
        ]
        self._running += loads
        slots = self.groups[layer].table.reserve(layer, experts, live, chance)
        self.counters[layer].early += len(loads)
        for load, slot in zip(loads, np.split(slots, len(slots)), strict=True):
            load.slots = slot
        requests = self.reader.submit_each([self._slices(load) for load in loads])
        for load, request in zip(loads, requests, strict=True):
            load.request = request

    def finish(self, load: Load) -> None:
        """Wait until a load's experts are in their slots; ExpertReadError if they cannot be.

        What was begun ahead and failed is read once more: a guess ends no run.
        """
        if load.request is None:
            return
        counters = self.counters[load.layer]
        start = perf_counter()
        try:
            try:
                load.request.wait()
            except ExpertReadError:
                if not load.ahead:
                    raise
                counters.failed += 1
                self._count_waste(load)
                load.ahead = False
                self._submit(load)
                load.request.wait()
        except BaseException:
            self._broken = True
            self.recover()
            raise
        finally:
            counters.stall_seconds += perf_counter() - start
        self._fill(load)

    def hurry(self, load: Load) -> None:
        """A pass asks for what an early load brings."""
        load.early = False
        self.counters[load.layer].late += 1
        load.request.hurry()

    def early(self) -> list[Load]:
        """Loads ahead under way that nobody has asked for."""
        return [one for one in self._running if one.early]

    def collect(self) -> None:
        """Early loads that are over: their experts are there, or, if a read failed, are not."""
        for load in self.early():
            if load.request is not None and load.request.done:
                try:
                    load.request.wait()
                except ExpertReadError:
                    self.counters[load.layer].failed += 1
                    self.drop(load)
                except BaseException:
                    self.drop(load)
                    raise
                else:
                    self._fill(load)

    def asked(self, layer: int, experts: np.ndarray) -> None:
        """The layer asks for experts: early loads of others were wrong guesses. They are given up
        together, lest one begins while another goes; what a thread has begun is left to finish, or
        the pass would have to wait for it."""
        wrong = [
            load
            for load in self.early()
            if load.layer == layer and not np.isin(load.experts, experts).any()
        ]
        gone = Request.withdraw([load.request for load in wrong])
        for load in wrong:
            if load.request in gone:
                self._forget(load)

    def drop(self, load: Load) -> None:
        """Give an early load up, and wait for what a thread has begun of it."""
        load.request.cancel()
        self._forget(load)

    def recover(self) -> None:
        """If an earlier pass ended amid its loads: stop all reads, and forget what they were to
        fill. What is full stays."""
        whole = all(load.early and load.request is not None for load in self._running)
        if whole and not self._broken:
            return
        self._broken = True  # until this has come to its end
        self.reader.drain()
        for load in self._running:
            if load.request is not None:
                self._count_waste(load)
        self._running = []
        for group in self.groups.values():
            group.table.rebuild()
        self._broken = False

    def _submit(self, load: Load) -> None:
        load.request = self.reader.submit(self._slices(load))

    def _slices(self, load: Load) -> list[Slice]:
        bank, slots = self.groups[load.layer].bank, load.slots.tolist()
        return self.slices(load.layer, load.experts.tolist(), bank, slots)

    def _forget(self, load: Load) -> None:
        """Of a cancelled load: its slots are free."""
        self._count_waste(load)
        self.groups[load.layer].table.release(load.slots)
        self._running.remove(load)

    def _fill(self, load: Load) -> None:
        self._count(load)
        self.groups[load.layer].table.fill(load.slots, load.early)
        self._running.remove(load)

    def _count(self, load: Load) -> None:
        counters, count = self.counters[load.layer], load.request.bytes_read
        counters.bytes_read += count
        if load.ahead:
            counters.early_bytes += count

    def _count_waste(self, load: Load) -> None:
        self._count(load)
        if load.ahead:
            self.counters[load.layer].wasted_bytes += load.request.bytes_read
