"""HotSet: how often each expert was used, to fill slots with the most used before the first token.

Read from a file that `--save-warm` wrote, or counted from a routing log. Refuses files of another
kind and those of a model with other layers or experts.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Self

import numpy as np

from specdec.durable import write_durably
from specdec.errors import RoutingLogError
from specdec.routing_log import MAGIC, RoutingLog
from specdec.shards import read_json

if TYPE_CHECKING:
    from specdec.target.expert_cache import ExpertCache
    from specdec.target.prefetch import Prefetcher

FORMAT, SCHEMA = "specdec-hot-set", 1


@dataclass(frozen=True)
class Warmed:
    """What was preloaded. named: experts of unpinned layers that the file names at all; experts:
    those that the slots took and that were read. These reads are in no figure of a run.
    tokens: of a routing log, those whose experts the routing table of --prefetch begins with."""

    named: int
    experts: int
    bytes_read: int
    seconds: float
    tokens: int = 0


@dataclass(frozen=True, eq=False)
class HotSet:
    """uses: layer -> int64 [experts], rows that used each. log: the routing log they were counted
    from, if it was one."""

    model: str
    uses: Mapping[int, np.ndarray]
    log: RoutingLog | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """RoutingLogError as the module says."""
        try:
            with path.open("rb") as file:
                head = file.read(len(MAGIC))
        except OSError as error:
            raise RoutingLogError(f"{path}: cannot be read: {error.strerror}") from error
        if head == MAGIC:
            log = RoutingLog.read(path)
            uses = dict(zip(log.header.layers, log.uses(), strict=True))
            return cls(log.header.model, uses, log)
        if not head.lstrip().startswith(b"{"):
            raise RoutingLogError(f"{path}: neither a routing log nor a hot set")
        raw = read_json(path)
        if raw.get("format") != FORMAT or raw.get("schema") != SCHEMA:
            raise RoutingLogError(
                f"{path}: format {raw.get('format')!r}, schema {raw.get('schema')!r}; expected "
                f"{FORMAT!r}, schema {SCHEMA}"
            )
        try:
            uses = {
                int(layer): np.array([int(one) for one in counts], np.int64)
                for layer, counts in raw["uses"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise RoutingLogError(f"{path}: broken: {error!r}") from error
        if any((counts < 0).any() for counts in uses.values()):
            raise RoutingLogError(f"{path}: broken: a negative count")
        return cls(str(raw.get("model")), uses)

    def save(self, path: Path) -> None:
        """RoutingLogError when it cannot be written."""
        document = {
            "format": FORMAT,
            "schema": SCHEMA,
            "model": self.model,
            "uses": {str(layer): counts.tolist() for layer, counts in self.uses.items()},
        }
        write_durably(path, (json.dumps(document) + "\n").encode(), RoutingLogError)

    def check(self, where: Path, cache: "ExpertCache") -> None:
        """RoutingLogError unless it is of a model with the cache's layers and experts."""
        store = cache.store
        sizes = {len(counts) for counts in self.uses.values()}
        if tuple(sorted(self.uses)) != store.layers or sizes != {store.num_experts}:
            raise RoutingLogError(
                f"{where}: is of {self.model}, {len(self.uses)} layers of "
                f"{'/'.join(map(str, sorted(sizes))) or 0} experts; this model has "
                f"{len(store.layers)} of {store.num_experts}"
            )

    def chosen(self, cache: "ExpertCache") -> dict[int, np.ndarray]:
        """Per unpinned layer the experts to preload: the most used that the slots take, ids in
        falling use (the lower layer and id first among equals). Experts never used are left out."""
        found: dict[int, list[int]] = {}
        groups: dict[int, list[int]] = {}
        for layer in cache.store.layers:
            if not cache.is_pinned(layer):
                groups.setdefault(id(cache.bank(layer)), []).append(layer)
        for layers in groups.values():
            room = cache.bank(layers[0]).gate.data.shape[0]
            uses = np.stack([self.uses[layer] for layer in layers])
            order = np.argsort(-uses, axis=None, kind="stable")[:room]
            for at in order[uses.ravel()[order] > 0].tolist():
                found.setdefault(layers[at // uses.shape[1]], []).append(at % uses.shape[1])
        return {layer: np.array(ids, np.int32) for layer, ids in sorted(found.items())}

    def teach(self, prefetcher: "Prefetcher") -> int:
        """Begin a routing table with the committed rows of a log; the tokens that it then knows."""
        if self.log is not None:
            rows = self.log.rows[self.log.committed]
            chosen = dict(zip(self.log.header.layers, rows["experts"].swapaxes(0, 1), strict=True))
            prefetcher.learn(rows["token"], chosen)
        return prefetcher.tokens

    def warm(
        self, cache: "ExpertCache", on_progress: Callable[[int, int], None] | None = None
    ) -> Warmed:
        """Preload into the slots, the most used as the most recent; counters start at zero after.

        ExpertReadError when a read fails. on_progress(experts read, experts to read).
        """
        start, chosen = perf_counter(), self.chosen(cache)
        cache.reset_counters()
        total = sum(map(len, chosen.values()))
        done = 0
        for layer, ids in chosen.items():
            for wave in cache.waves(layer, ids):
                done += len(wave.experts)
                if on_progress is not None:
                    on_progress(done, total)
        hottest = sorted(
            ((self.uses[layer][i], -layer, -i) for layer, ids in chosen.items() for i in ids)
        )
        for _, layer, expert in hottest:
            cache.touch(-int(layer), np.array([-int(expert)]))
        counters = cache.counters()
        cache.reset_counters()
        unpinned = [layer for layer in cache.store.layers if not cache.is_pinned(layer)]
        return Warmed(
            named=sum(int((self.uses[layer] > 0).sum()) for layer in unpinned),
            experts=sum(one.misses for one in counters),
            bytes_read=sum(one.bytes_read for one in counters),
            seconds=perf_counter() - start,
        )
