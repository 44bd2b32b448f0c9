"""What a run's experts cost: traffic, waiting, and how they were read. Part of specdec.metrics."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from specdec.prefetch_metrics import PrefetchMetrics, prefetch_metrics
from specdec.ratio import ratio

if TYPE_CHECKING:  # for types only: counting must not pay for importing MLX
    from specdec.generation import Result


@dataclass(frozen=True)
class LayerExperts:
    """One layer's expert traffic; a request is one distinct expert needed by one forward pass.

    hit_rate: of this layer; 1 where it is pinned and was used.
    evictions: experts of this layer that left their slots for others.
    stall_seconds: time in which forward passes waited for this layer's reads.
    """

    layer: int
    pinned: bool
    hits: int
    misses: int
    hit_rate: float | None
    bytes_read: int
    evictions: int
    stall_seconds: float


@dataclass(frozen=True)
class LayerSeconds:
    """One layer's time over all passes of a run, timed half by half (--timing).

    mixer: attention or gated delta. io_wait: waiting for reads. experts: the rest of the
    feed-forward, router and shared expert included.
    """

    layer: int
    kind: str
    mixer: float
    io_wait: float
    experts: float


@dataclass(frozen=True)
class ExpertMetrics:
    """Expert traffic of a run, prefill included.

    hits, misses: requests of unpinned layers found in a slot, and read from disk.
    pinned_requests: requests of pinned layers, which never read.
    hit_rate: hits / (hits + misses), unpinned layers only.
    effective_hit_rate: (hits + pinned_requests) / all requests. Pinning more layers can lower
        `hit_rate` (fewer slots for the rest) while it raises this one: compare settings by this.
    bytes_read: bytes read from disk, counted at the read.
    bytes_per_token: bytes_read / generated tokens.
    bytes_per_round: bytes read after the prefill / rounds.
    read_seconds: wall time in which at least one read was under way.
    read_bandwidth: bytes that the disk delivered per second of it.
    stall_seconds: time in which forward passes waited for reads.
    evictions: experts that left their slots for others.
    synchronizations_per_pass: times the host waited for results of unpinned layers, per forward
        pass: one for each such layer, and more when experts come in several waves.
    io, queue_depth, policy, protect: how experts were read and kept. prefetch: how they were read
        ahead; None where nothing told.
    """

    hits: int
    misses: int
    pinned_requests: int
    hit_rate: float | None
    effective_hit_rate: float | None
    bytes_read: int
    bytes_per_token: float | None
    bytes_per_round: float | None
    read_seconds: float
    read_bandwidth: float | None
    stall_seconds: float
    evictions: int
    synchronizations_per_pass: float | None
    io: str | None
    queue_depth: int | None
    policy: str | None
    protect: tuple[int, int] | None
    layers: tuple[LayerExperts, ...]
    layer_seconds: tuple[LayerSeconds, ...] | None
    prefetch: PrefetchMetrics | None = None


def expert_metrics(result: "Result") -> ExpertMetrics:
    """The figures of one run."""
    layers = tuple(
        LayerExperts(
            one.layer,
            one.pinned,
            one.hits,
            one.misses,
            ratio(one.hits, one.hits + one.misses),
            one.bytes_read,
            one.evictions,
            one.stall_seconds,
        )
        for one in result.experts
    )
    hits = sum(one.hits for one in layers if not one.pinned)
    misses = sum(one.misses for one in layers if not one.pinned)
    pinned = sum(one.hits for one in layers if one.pinned)
    bytes_read = sum(one.bytes_read for one in layers)
    passes = max((one.passes for one in result.experts), default=0)
    waits = sum(one.synchronizations for one in result.experts)
    reads, how = result.reads, result.streaming
    return ExpertMetrics(
        hits=hits,
        misses=misses,
        pinned_requests=pinned,
        hit_rate=ratio(hits, hits + misses),
        effective_hit_rate=ratio(hits + pinned, hits + misses + pinned),
        bytes_read=bytes_read,
        bytes_per_token=ratio(bytes_read, len(result.tokens)),
        bytes_per_round=ratio(bytes_read - result.prompt_bytes_read, len(result.rounds)),
        read_seconds=reads.seconds if reads else 0.0,
        read_bandwidth=ratio(reads.bytes, reads.seconds) if reads else None,
        stall_seconds=sum(one.stall_seconds for one in layers),
        evictions=sum(one.evictions for one in layers),
        synchronizations_per_pass=ratio(waits, passes),
        io=how.io if how else None,
        queue_depth=how.queue_depth if how else None,
        policy=how.policy if how else None,
        protect=how.protect if how else None,
        layers=layers,
        layer_seconds=_layer_seconds(result),
        prefetch=prefetch_metrics(result),
    )


def _layer_seconds(result: "Result") -> tuple[LayerSeconds, ...] | None:
    if result.layer_times is None:
        return None
    stalls = {one.layer: one.stall_seconds for one in result.experts}
    return tuple(
        LayerSeconds(
            one.layer,
            one.kind,
            one.mixer,
            stalls.get(one.layer, 0.0),
            max(0.0, one.feed_forward - stalls.get(one.layer, 0.0)),
        )
        for one in result.layer_times
    )
