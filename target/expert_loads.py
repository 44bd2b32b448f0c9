"""ExpertLoads: experts on their way from disk into the slots of a bank.

`begin` reserves slots and submits one request for all of them, `finish` waits for it and only then
calls the slots full. Whatever ends a pass between the two, an error or an interrupt, leaves loads
behind; `recover` stops their reads before their slots are given to anybody else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from specdec.errors import ExpertReadError
from specdec.target.expert_bank import ExpertBank
from specdec.target.expert_counters import LayerCounters
from specdec.target.expert_reader import ExpertReader, Request
from specdec.target.read_plan import Slice
from specdec.target.slots import SlotTable
from specdec.target.store import Store


@dataclass(frozen=True)
class Group:
    """The bank and the slots that layers of one geometry share."""

    bank: ExpertBank
    table: SlotTable


@dataclass(eq=False)
class Load:
    """Experts of one layer that are being read; early: nobody has asked for them yet."""

    layer: int
    experts: np.ndarray
    early: bool = False
    slots: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    request: Request | None = None


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

    def begin(self, layer: int, experts: np.ndarray, live: np.ndarray, early: bool = False) -> Load:
        """Reserve slots beside the live ones and begin to read; early reads wait for idle disks."""
        group = self.groups[layer]
        load = Load(layer, experts, early)
        if len(experts):
            self._running.append(load)
            load.slots = group.table.reserve(layer, experts, live)
            slices = self.slices(layer, experts.tolist(), group.bank, load.slots.tolist())
            load.request = self.reader.submit(slices, idle=early)
        return load

    def finish(self, load: Load) -> None:
        """Wait until a load's experts are in their slots; ExpertReadError if they cannot be."""
        if load.request is None:
            return
        counters = self.counters[load.layer]
        start = perf_counter()
        try:
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
        assert load.request is not None
        load.early = False
        load.request.hurry()

    def early(self, layer: int | None = None) -> list[Load]:
        """Early loads under way, of one layer or of all."""
        return [one for one in self._running if one.early and layer in (None, one.layer)]

    def collect(self) -> None:
        """Early loads that are over: their experts are there, or, if a read failed, are not, and
        whoever asks for them meets the error."""
        for load in self.early():
            if load.request is not None and load.request.done:
                try:
                    load.request.wait()
                except ExpertReadError:
                    self.drop(load)
                else:
                    self._fill(load)

    def drop(self, load: Load) -> None:
        """Give an early load up."""
        assert load.request is not None
        load.request.cancel()
        self.counters[load.layer].bytes_read += load.request.bytes_read
        self.groups[load.layer].table.release(load.slots)
        self._running.remove(load)

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
                self.counters[load.layer].bytes_read += load.request.bytes_read
        self._running = []
        for group in self.groups.values():
            group.table.rebuild()
        self._broken = False

    def _fill(self, load: Load) -> None:
        assert load.request is not None
        self.counters[load.layer].bytes_read += load.request.bytes_read
        self.groups[load.layer].table.fill(load.slots, load.early)
        self._running.remove(load)
