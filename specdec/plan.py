"""MemoryPlan: what a run will hold in memory, decided and printed before any weight is read.

How many layers are pinned and how many slots the others share, unless both are given:

- Everything but experts is fixed; what remains under the cap goes to experts.
- All experts fit: all layers are pinned, and there are no slots.
- Otherwise a layer that is not pinned should have slots for a verify pass: for as many experts as
  the rows of a tree are expected to need, and for 2 x top-k at least. As many layers are pinned as
  leave that much to the others, and those share all that is left.
- Pins given: the slots take what is left. Slots given: as many layers are pinned as fit beside.

Refuses, with the numbers: pins out of range, fewer slots than kinds of layers, and what does not
fit under the cap. More slots than there are experts to hold are cut, and the plan says so.
"""

from dataclasses import dataclass
from typing import NamedTuple

from specdec.checkpoint import Checkpoint
from specdec.draft.config import DraftConfig
from specdec.errors import PlanError
from specdec.footprint import (
    Sizes,
    dense_parts,
    draft_bytes,
    kv_bytes,
    kv_capacity,
    prefill_scratch,
    state_bytes,
    verify_scratch,
)
from specdec.memory import default_cap
from specdec.target.expert_reader import reader_bytes
from specdec.target.pins import pinned_layers, share_slots
from specdec.target.quotas import union
from specdec.target.store import Store
from specdec.target.streaming import Streaming
from specdec.target.token_table import table_bytes
from specdec.units import size

# What MLX keeps of freed buffers on a CPU; load sets the same limit everywhere.
KEPT_BYTES = 32 << 20
ROUTING_TABLE = "routing table"


class Part(NamedTuple):
    """One line of the plan."""

    name: str
    bytes: int
    note: str


# What the kernels of a backend take of the process beside its data.
KERNEL_PARTS = {
    # Numba and LLVM, and what compiling for the first time takes (measured: 150 MB when kernels
    # come from its cache, 280 MB when not, 330 MB in a fresh installation).
    "cpu": Part("kernel compiler", 350_000_000, "Numba"),
    # Measured on an H100: 900 MB beyond what is there once MLX has started, in every run, whatever
    # the model's size. Compiling takes more, once for an installation, and says so.
    "cuda": Part("kernels", 950_000_000, "CUDA's libraries and modules, on the host"),
}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per part, and the decision about the experts.

    cap_note: where the cap comes from. pinned: layers, ascending. slots: of all other layers.
    """

    parts: tuple[Part, ...]
    cap: int
    cap_note: str
    pinned: tuple[int, ...]
    slots: int

    def __post_init__(self) -> None:
        assert self.total <= self.cap
        assert all(part.bytes >= 0 for part in self.parts)

    @property
    def total(self) -> int:
        return sum(part.bytes for part in self.parts)

    def rows(self) -> list[tuple[str, str, str]]:
        """Name, size and note of every part, then the total against the cap."""
        lines = [(part.name, size(part.bytes), part.note) for part in self.parts]
        return [*lines, ("total", size(self.total), f"of {size(self.cap)}, {self.cap_note}")]


def make_plan(
    store: Store,
    draft: tuple[Checkpoint, DraftConfig] | None,
    sizes: Sizes,
    *,
    pin_layers: int | None = None,
    cache_slots: int | None = None,
    memory_bytes: int | None = None,
    runtime_bytes: int = 0,
    backend: str = "",
    streaming: Streaming | None = None,
) -> MemoryPlan:
    """Plan a run from headers and configs; reads no weight.

    pin_layers, cache_slots: as asked for, None to decide here. memory_bytes: the cap, None for
    `default_cap`. runtime_bytes: what the process holds already. backend: whose kernels will run
    (KERNEL_PARTS). streaming: how experts will be read; None for a run that reads none.
    PlanError as the module says.
    """
    cap, cap_note = default_cap() if memory_bytes is None else (memory_bytes, "as asked for")
    weights = [
        Part("runtime", runtime_bytes, "this process before loading"),
        *([KERNEL_PARTS[backend]] if backend in KERNEL_PARTS else []),
        *(
            Part(name, count, "")
            for name, count in dense_parts(store.checkpoint, store.config, sizes.dtype).items()
        ),
    ]
    reads = _reads_parts(store, streaming) if streaming is not None else []
    others = reads + _state_parts(store, draft, sizes) + _scratch_parts(store, draft, sizes)
    fixed = sum(part.bytes for part in (*weights, *others))
    experts = _Experts(store, sizes)
    pins, slots = experts.choose(cap - fixed, pin_layers, cache_slots)
    if not slots:  # nothing is read while it runs
        others = [part for part in others if part.name != ROUTING_TABLE]
        fixed = sum(part.bytes for part in (*weights, *others))
    total = fixed + experts.bytes(pins, slots)
    if total > cap:
        best = experts.choose(cap - fixed, None, None)
        fits = fixed + experts.bytes(*best) <= cap
        raise PlanError(
            f"the memory plan needs {size(total)}, the cap is {size(cap)} ({cap_note}): "
            f"{size(fixed)} without experts, {size(total - fixed)} for {pins} pinned layers and "
            f"{slots} slots. "
            + (
                f"What fits is --pin-layers {best[0]} --cache-slots {best[1]}"
                if fits
                else f"The least is {size(fixed + experts.bytes(*best))}: raise --memory-gb, or "
                "ask for a shorter context, a smaller --prefill-chunk or a smaller --budget"
            )
        )
    parts = (*weights, *experts.parts(pins, slots, cache_slots), *others)
    return MemoryPlan(parts, cap, cap_note, pinned_layers(pins, store.layers), slots)


def _reads_parts(store: Store, streaming: Streaming) -> list[Part]:
    parts = [Part("expert reads", reader_bytes(streaming.queue_depth), str(streaming))]
    if streaming.prefetch in ("auto", "draft"):
        config = store.config
        count = table_bytes(config.vocab_size, len(store.layers), config.top_k)
        parts.append(Part(ROUTING_TABLE, count, "experts by token, for prefetch"))
    return parts


def _state_parts(
    store: Store, draft: tuple[Checkpoint, DraftConfig] | None, sizes: Sizes
) -> list[Part]:
    config, context = store.config, sizes.staged(draft[1] if draft else None)
    positions = f"{len(config.full_layers)} layers, {kv_capacity(context)} positions"
    parts = [Part("KV cache", kv_bytes(config, context, sizes.dtype), positions)]
    if config.linear_layers:
        states = state_bytes(config, sizes.dtype)
        parts.append(Part("recurrent states", states, f"{len(config.linear_layers)} layers"))
    if draft:
        weights, cache = draft_bytes(*draft, sizes)
        parts += [Part("draft", weights, ""), Part("draft KV cache", cache, "")]
    return parts


def _scratch_parts(
    store: Store, draft: tuple[Checkpoint, DraftConfig] | None, sizes: Sizes
) -> list[Part]:
    config = draft[1] if draft else None
    prefill = prefill_scratch(store.config, config, sizes)
    verify = verify_scratch(store.config, config, sizes)
    scratch, note = max(
        (prefill, f"estimate, prefill in chunks of {min(sizes.chunk, sizes.prompt)}"),
        (verify, f"estimate, verify of {sizes.rows} rows"),
    )
    # NumPy's arrays go back to the system as they are freed, but for gaps between small ones.
    kept = KEPT_BYTES + scratch // (8 if sizes.row_by_row else 2)
    return [Part("scratch", scratch, note), Part("allocator", kept, "freed memory kept for reuse")]


class _Experts:
    """Costs and choices of pins and slots; a count of pins stands for `pinned_layers` of it."""

    def __init__(self, store: Store, sizes: Sizes) -> None:
        self.store, self.sizes = store, sizes
        self.each = {
            layer: store.geometry(layer).bytes_resident(sizes.dtype) for layer in store.layers
        }

    def choose(self, room: int, pins: int | None, slots: int | None) -> tuple[int, int]:
        """Pins and slots by the module's rule. Below the least that works only when so asked,
        at the least when nothing fits in `room` bytes."""
        layers = self.store.layers
        if pins is not None:
            pinned_layers(pins, layers)
        elif slots is not None:
            counts = range(len(layers) + 1)
            pins = max((n for n in counts if self.bytes(n, slots) <= room), default=0)
        else:
            counts = range(len(layers) + 1)
            pins = max((n for n in counts if self.bytes(n, self.wanted(n)) <= room), default=0)
        groups = self.groups(pins)
        if slots is None:
            slots = max(self.slots_within(room, pins), len(groups))
        elif groups:
            share_slots(slots, list(groups.values()))
        return pins, min(slots, sum(groups.values()))

    def groups(self, pins: int) -> dict:
        """Experts of the unpinned layers by geometry."""
        pinned = pinned_layers(pins, self.store.layers)
        groups: dict = {}
        for layer in self.store.layers:
            if layer not in pinned:
                geometry = self.store.geometry(layer)
                groups[geometry] = groups.get(geometry, 0) + self.store.num_experts
        return groups

    def bytes(self, pins: int, slots: int) -> int:
        """Resident bytes of pinned layers and slots; 0 slots of a group cost what one does."""
        pinned = sum(self.each[i] for i in pinned_layers(pins, self.store.layers))
        return pinned * self.store.num_experts + self.slot_bytes(pins, slots)

    def slot_bytes(self, pins: int, slots: int) -> int:
        groups = self.groups(pins)
        if not groups:
            return 0
        shares = share_slots(max(slots, len(groups)), list(groups.values()))
        return sum(
            share * geometry.bytes_resident(self.sizes.dtype)
            for geometry, share in zip(groups, shares, strict=True)
        )

    def wanted(self, pins: int) -> int:
        """Slots that a verify pass wants of the unpinned layers together.

        What quotas are made for, too (target/quotas.py).
        """
        store = self.store
        layer = union(store.num_experts, store.config.top_k, self.sizes.rows)
        return layer * (len(self.store.layers) - pins)

    def slots_within(self, room: int, pins: int) -> int:
        """The most slots that fit beside the pins, by bisection; 0 if not even the least do."""
        low, high = 0, sum(self.groups(pins).values())
        while low < high:
            middle = (low + high + 1) // 2
            if self.bytes(pins, middle) <= room:
                low = middle
            else:
                high = middle - 1
        return low

    def parts(self, pins: int, slots: int, asked: int | None) -> list[Part]:
        store, groups = self.store, self.groups(pins)
        pinned, slotted = pinned_layers(pins, store.layers), self.slot_bytes(pins, slots)
        cut = ""
        if asked is not None and asked > slots:
            cut = f"; {asked} slots asked for, for {sum(groups.values())} experts"
        parts = []
        if pinned:
            note = f"{pins} of {len(store.layers)} layers: {_ranges(pinned)}"
            note += "" if groups else cut
            parts.append(Part("pinned experts", self.bytes(pins, slots) - slotted, note))
        if groups:
            layers = len(store.layers) - pins
            note = f"{slots} for {layers} layers of {store.num_experts} experts"
            if len(groups) > 1:
                shares = share_slots(slots, list(groups.values()))
                note += f", by shape {' + '.join(map(str, shares))}"
            if slots < self.wanted(pins):
                note += f"; a verify pass wants about {self.wanted(pins)}"
            parts.append(Part("expert slots", slotted, note + cut))
        return parts


def _ranges(layers: tuple[int, ...]) -> str:
    """Ascending numbers in short: 0-18, 23."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
