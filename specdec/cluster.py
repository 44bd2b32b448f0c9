"""Clustering: an order of a layer's experts in which those that are used together lie together.

Learnt from the first half of a routing log and judged on the second: what an order is worth is how
many of the experts that a decoding pass needs of a layer are neighbours, since neighbours are read
with one read. Two orders are tried per layer and the better one on the first half is taken:
the leaves of a hierarchical clustering of co-activation (average linkage, optimal leaf order), and
the Fiedler vector of its graph.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from specdec.errors import RoutingLogError
from specdec.routing_log import PROMPT, RoutingLog

ROWS_AT_A_TIME = 8192


@dataclass(frozen=True)
class Adjacency:
    """What an order gives: experts asked for, and reads they take when neighbours are merged.

    bytes_per_read: mean bytes of a merged read.
    """

    requests: int
    reads: int
    bytes_per_read: float

    @property
    def adjacent(self) -> float:
        """Share of requests that need no read of their own."""
        return 1 - self.reads / self.requests


@dataclass(frozen=True)
class Clustering:
    """places: expert -> place, per layer. before, after: identity and the new order on the passes
    that nothing was learnt from."""

    places: Mapping[int, tuple[int, ...]]
    passes: tuple[int, int]
    before: Adjacency
    after: Adjacency


def cluster(log: RoutingLog, on_progress: Callable[[int, int], None] | None = None) -> Clustering:
    """Order the experts of every layer of a log. RoutingLogError for one with too few passes."""
    half = log.passes // 2
    if half < 1:
        raise RoutingLogError(
            f"the routing log has {log.passes} passes; clustering learns from one half and is "
            "judged on the other"
        )
    learnt, judged = log.part(0, half), log.part(half, log.passes)
    header = log.header
    seen = _decoding(learnt)
    places = {}
    for at, layer in enumerate(header.layers):
        together = coactivation(learnt.rows["experts"][:, at], header.experts)
        mine = seen[seen[:, 1] == at]
        tried = [np.argsort(order) for order in (leaf_order(together), fiedler_order(together))]
        places[layer] = min(tried, key=lambda one: _reads(mine, one[mine[:, 2]], header.experts))
        if on_progress is not None:
            on_progress(at + 1, len(header.layers))
    identity = {layer: np.arange(header.experts) for layer in header.layers}
    return Clustering(
        {layer: tuple(one.tolist()) for layer, one in places.items()},
        (half, log.passes - half),
        adjacency(judged, identity),
        adjacency(judged, places),
    )


def adjacency(log: RoutingLog, places: Mapping[int, Any]) -> Adjacency:
    """How an order serves the decoding passes of a log (of a log without any, its prompts)."""
    asked, header = _decoding(log), log.header
    table = np.stack([np.asarray(places[layer]) for layer in header.layers])
    at = table[asked[:, 1], asked[:, 2]]
    reads = _reads(asked, at, header.experts)
    total = int(np.asarray(header.disk_bytes)[asked[:, 1]].sum())
    return Adjacency(len(asked), reads, total / reads)


def coactivation(chosen: np.ndarray, experts: int) -> np.ndarray:
    """float64 [experts, experts]: rows of chosen [rows, top_k] that use both; each one's own uses
    on the diagonal."""
    counts = np.zeros((experts, experts))
    for start in range(0, len(chosen), ROWS_AT_A_TIME):
        part = chosen[start : start + ROWS_AT_A_TIME]
        uses = np.zeros((len(part), experts), np.float32)
        np.put_along_axis(uses, part.astype(np.int64), 1, axis=1)
        counts += uses.T @ uses
    return counts


def leaf_order(together: np.ndarray) -> np.ndarray:
    """Experts in the leaf order of a clustering by cosine distance of use."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    distance = 1 - _cosine(together)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    return leaves_list(tree).astype(np.int64)


def fiedler_order(together: np.ndarray) -> np.ndarray:
    """Experts along the second eigenvector of the Laplacian of the graph of use."""
    from scipy.linalg import eigh

    weights = _cosine(together)
    np.fill_diagonal(weights, 0)
    laplacian = np.diag(weights.sum(axis=1)) - weights
    _, vectors = eigh(laplacian, subset_by_index=[0, min(1, len(weights) - 1)])
    return np.argsort(vectors[:, -1], kind="stable")


def report(done: Clustering) -> list[str]:
    """What the order gained, in words."""
    before, after = done.before, done.after
    gain = after.bytes_per_read / before.bytes_per_read - 1
    lines = [
        f"order learnt from {done.passes[0]} passes, judged on {done.passes[1]} others: "
        f"{before.requests} experts asked for",
        f"neighbours {100 * before.adjacent:.1f} % -> {100 * after.adjacent:.1f} %, "
        f"bytes per merged read {before.bytes_per_read:,.0f} -> {after.bytes_per_read:,.0f} "
        f"({100 * gain:+.1f} %), when nothing is in memory",
    ]
    if gain <= 0:
        lines.append("this order gains NOTHING over the ids' own on passes it has not seen")
    return lines


def _cosine(together: np.ndarray) -> np.ndarray:
    uses = np.sqrt(np.maximum(np.diagonal(together), 1))
    return together / uses[:, None] / uses


def _decoding(log: RoutingLog) -> np.ndarray:
    """Requests of decoding passes; of all passes where there are none."""
    decoding = (log.rows["flags"] & PROMPT) == 0
    return log.requests(decoding if decoding.any() else None)


def _reads(asked: np.ndarray, places: np.ndarray, experts: int) -> int:
    """Reads for requests [n, 3] at these places of their layers, neighbours merged."""
    asks = asked[:, 0] * (asked[:, 1].max(initial=0) + 1) + asked[:, 1]
    at = np.sort(asks * (experts + 1) + places)  # one place between asks: they never touch
    return int((np.diff(at, prepend=-2) != 1).sum())
