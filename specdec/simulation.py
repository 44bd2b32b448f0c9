"""Simulation: what pins, slots and a policy would have done for the run that a log holds.

The policy "lru" is replayed by compiled code, the others by the bookkeeping of the cache itself
(target.slots), which takes longer. Nothing is read, and reads ahead of need are left out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from specdec import replay
from specdec.errors import PlanError
from specdec.instant import Instant
from specdec.ratio import ratio
from specdec.target.admission import Admission
from specdec.target.pins import pinned_layers, share_slots
from specdec.target.policy import make_policy
from specdec.target.quotas import protected_layers, quotas, union
from specdec.target.slots import SlotTable
from specdec.trace import Trace, ask_starts, pass_starts
from specdec.units import size


@dataclass(frozen=True)
class Setting:
    """As the options of their names; slots may be cut to the experts there are."""

    pins: int
    slots: int
    policy: str
    protect: tuple[int, int] = (6, 3)
    rows: int = 1


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What a setting gives over a whole log, as specdec.metrics defines it."""

    setting: Setting
    hits: int
    misses: int
    bytes_read: int
    tokens: int

    @property
    def hit_rate(self) -> float | None:
        return ratio(self.hits, self.hits + self.misses)

    @property
    def bytes_per_token(self) -> float | None:
        return ratio(self.bytes_read, self.tokens)


@dataclass(frozen=True, kw_only=True)
class Outcome(Replayed):
    """optimal: hits that evicting with knowledge of the future would have had; a bound."""

    pinned_requests: int
    optimal: int

    @property
    def effective_hit_rate(self) -> float | None:
        requests = self.hits + self.misses + self.pinned_requests
        return ratio(self.hits + self.pinned_requests, requests)

    @property
    def optimal_hit_rate(self) -> float | None:
        return ratio(self.optimal, self.hits + self.misses)


@dataclass(frozen=True)
class Group:
    """Layers that share slots, by their places in the header."""

    layers: tuple[int, ...]
    slots: int
    quotas: dict[int, int]


def simulate(trace: Trace, setting: Setting, bound: bool = True) -> Outcome:
    """One setting. bound: also replay the optimum. PlanError for pins or slots out of range."""
    header = trace.header
    hits = misses = best = nbytes = 0
    unpinned: list[int] = []
    for group in groups(trace, setting):
        asks, uses = trace.part(list(group.layers))
        unpinned += group.layers
        hit, missed = _replay(asks, uses, trace.passes, header.experts, group, setting.policy)
        hits, misses = hits + int(hit.sum()), misses + int(missed.sum())
        nbytes += int((missed * np.array(header.disk_bytes)[list(group.layers)]).sum())
        if bound:
            layers = len(group.layers)
            found, _ = replay.optimal(asks, ask_starts(asks), header.experts, group.slots, layers)
            best += int(found.sum())
    slots = min(setting.slots, len(unpinned) * header.experts)
    return Outcome(
        setting=replace(setting, slots=slots),
        hits=hits,
        misses=misses,
        bytes_read=nbytes,
        tokens=trace.tokens,
        pinned_requests=len(trace.asks) - hits - misses,
        optimal=best,
    )


def resident_bytes(trace: Trace, pins: int, slots: int) -> int:
    """Bytes of pinned layers and slots together."""
    header = trace.header
    pinned = set(pinned_layers(pins, header.layers))
    each = dict(zip(header.layers, header.resident_bytes, strict=True))
    total = sum(each[layer] for layer in pinned) * header.experts
    kinds = _kinds(trace, pins)
    if kinds:
        sizes = [len(layers) * header.experts for layers in kinds]
        for layers, share in zip(kinds, share_slots(slots, sizes), strict=True):
            total += share * header.resident_bytes[layers[0]]
    return total


def fitting(trace: Trace, room: int, policy: str, like: Setting) -> Iterator[Setting]:
    """Per number of pins that fits in `room` bytes, the setting with as many slots as fit."""
    header = trace.header
    for pins in range(len(header.layers) + 1):
        kinds = _kinds(trace, pins)
        low = len(kinds)
        if resident_bytes(trace, pins, low) > room:
            return
        high = sum(len(layers) for layers in kinds) * header.experts
        while low < high:
            middle = (low + high + 1) // 2
            if resident_bytes(trace, pins, middle) <= room:
                low = middle
            else:
                high = middle - 1
        yield replace(like, pins=pins, slots=low, policy=policy)


def best(
    trace: Trace,
    room: int,
    policies: Sequence[str],
    like: Setting,
    on_progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """The setting that reads the least per token with `room` bytes for experts; PlanError if not
    even one slot of each kind fits. Policies after the first are tried at the best pins of the
    first and their neighbours."""
    first, *others = policies
    tried = list(fitting(trace, room, first, like))
    if not tried:
        least = resident_bytes(trace, 0, len(_kinds(trace, 0)))
        raise PlanError(f"{size(room)} are left for experts, the least is {size(least)}")
    outcomes = []
    for at, setting in enumerate(tried):
        outcomes.append(simulate(trace, setting, bound=False))
        if on_progress is not None:
            on_progress(at + 1, len(tried))
    top = min(outcomes, key=_cost).setting
    for policy in others:
        near = [one for one in tried if abs(one.pins - top.pins) <= 1]
        outcomes += [simulate(trace, replace(one, policy=policy), bound=False) for one in near]
    return simulate(trace, min(outcomes, key=_cost).setting)


def _cost(outcome: Outcome) -> tuple[int, int]:
    return outcome.bytes_read, outcome.setting.pins


def _kinds(trace: Trace, pins: int) -> list[list[int]]:
    """Unpinned layers (places in the header) by the kind of their experts, as the cache has it."""
    header = trace.header
    pinned = set(pinned_layers(pins, header.layers))
    kinds: dict[int, list[int]] = {}
    for at, layer in enumerate(header.layers):
        if layer not in pinned:
            kinds.setdefault(header.kinds[at], []).append(at)
    return list(kinds.values())


def groups(trace: Trace, setting: Setting) -> Iterator[Group]:
    """The layers that are not pinned, by what slots they share."""
    header, kinds = trace.header, _kinds(trace, setting.pins)
    if not kinds:
        return
    sizes = [len(layers) * header.experts for layers in kinds]
    protected = protected_layers(setting.protect, header.layers)
    wanted = union(header.experts, header.top_k, setting.rows)
    for layers, share in zip(kinds, share_slots(setting.slots, sizes), strict=True):
        names = [header.layers[at] for at in layers]
        quota = quotas(share, names, wanted, header.top_k, protected)
        yield Group(
            tuple(layers), share, {at: quota[n] for at, n in zip(layers, names, strict=True)}
        )


def _replay(
    asks: np.ndarray, uses: np.ndarray, passes: int, experts: int, group: Group, policy: str
) -> tuple[np.ndarray, np.ndarray]:
    """(hits, misses) per layer of the group."""
    starts, use_starts = ask_starts(asks), pass_starts(uses, passes)
    quota = np.array(list(group.quotas.values()), np.int64)
    if policy == "lru":
        return replay.lru(asks, starts, uses, use_starts, experts, group.slots, quota)
    return replay_table(asks, starts, uses, use_starts, experts, group.slots, quota, policy)


def replay_table(
    asks: np.ndarray,
    starts: np.ndarray,
    uses: np.ndarray,
    use_starts: np.ndarray,
    experts: int,
    slots: int,
    quota: np.ndarray,
    policy: str,
) -> tuple[np.ndarray, np.ndarray]:
    """As replay.lru, with any policy, by the cache's own bookkeeping."""
    layers = len(quota)
    table = SlotTable(slots, experts, dict(enumerate(quota.tolist())), make_policy(policy, slots))
    admission = Admission(table, Instant(table))
    hits, misses = np.zeros(layers, np.int64), np.zeros(layers, np.int64)
    told = 0
    for first, last in pairwise(starts):
        now, layer = int(asks[first, 0]), int(asks[first, 1])
        while told < now:
            _tell(table, uses[use_starts[told] : use_starts[told + 1]])
            told += 1
        asked = admission.ask(layer, asks[first:last, 2].astype(np.int32))
        hits[layer] += len(asked.hits)
        misses[layer] += len(asked.missing)
        for _ in admission.waves(asked):
            pass
    return hits, misses


def _tell(table: SlotTable, used: np.ndarray) -> None:
    for layer in np.unique(used[:, 1]).tolist():
        table.touch(layer, used[used[:, 1] == layer, 2])
