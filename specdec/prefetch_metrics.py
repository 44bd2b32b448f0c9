"""What reading experts ahead brought and cost a run. Part of specdec.metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specdec.ratio import ratio

if TYPE_CHECKING:  # for types only: counting must not pay for importing MLX
    from specdec.generation import Result


@dataclass(frozen=True)
class PrefetchMetrics:
    """Experts read ahead of need (--prefetch), prefill included.

    way: as asked for. passes: verify passes by what foresaw them ("off" among them).
    experts: begun to be read ahead. in_time: of them, those that were there when first asked for;
        late: those still being read then. failed: those that could not be read ahead.
    coverage: in_time / (in_time + misses): the share of what would have been missed that was not.
    bytes: read ahead, part of the run's bytes_read. wasted_bytes: of them, those that were given
        up, failed, or left their slots without having been asked for; waste: their share.
    verdicts: what "auto" decided, in order.
    """

    way: str
    passes: Mapping[str, int]
    experts: int
    in_time: int
    late: int
    failed: int
    coverage: float | None
    bytes: int
    wasted_bytes: int
    waste: float | None
    verdicts: tuple[str, ...]


def prefetch_metrics(result: "Result") -> PrefetchMetrics | None:
    """Of one run; None where nothing told."""
    use, layers = result.prefetch, result.experts
    if use is None:
        return None
    in_time = sum(one.early_hits for one in layers)
    misses = sum(one.misses for one in layers if not one.pinned)
    early = sum(one.early_bytes for one in layers)
    wasted = sum(one.wasted_bytes for one in layers)
    return PrefetchMetrics(
        way=use.way,
        passes=use.passes,
        experts=sum(one.early for one in layers),
        in_time=in_time,
        late=sum(one.late for one in layers),
        failed=sum(one.failed for one in layers),
        coverage=ratio(in_time, in_time + misses),
        bytes=early,
        wasted_bytes=wasted,
        waste=ratio(wasted, early),
        verdicts=use.words,
    )
