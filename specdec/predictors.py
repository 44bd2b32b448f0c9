"""Predictors: what a logged run's experts could have been foreseen from, replayed with a cache.

previous: the experts of the last committed row, again. The baseline: others must beat it.
draft: by token, the experts of the row of that token that was committed last (--prefetch draft).
layer: the next layer's experts from this layer's, by how often they followed each other in
    committed rows so far. It stands for --prefetch layer, whose router needs what no log holds.

Of a disk without delay, so that what is read ahead is there in time: the most that could be had.
As many experts are read ahead for a layer as target/guesses.py says, as in a run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from specdec.instant import Instant
from specdec.ratio import ratio
from specdec.routing_log import PROMPT, RoutingLog
from specdec.simulation import Replayed, Setting, groups
from specdec.target.admission import Admission
from specdec.target.guesses import Guesses
from specdec.target.policy import make_policy
from specdec.target.slots import SlotTable
from specdec.target.token_table import TokenTable, table_tokens
from specdec.trace import Trace

PREDICTORS = ("off", "previous", "draft", "layer")


@dataclass(frozen=True, kw_only=True)
class Foreseen(Replayed):
    """A predictor over a whole log; what was read ahead counts as a hit.

    guesses: experts of unpinned layers that it named for trees, right: those of them that were
    asked for, of `asked`. begun: guesses that were read ahead; in_time: asked for while there;
    wasted: evicted unasked.
    """

    predictor: str
    guesses: int
    right: int
    asked: int
    begun: int
    in_time: int
    wasted: int

    @property
    def precision(self) -> float | None:
        """Of what it named, the share that was asked for."""
        return ratio(self.right, self.guesses)

    @property
    def recall(self) -> float | None:
        """Of what trees asked for, the share that it had named."""
        return ratio(self.right, self.asked)

    @property
    def coverage(self) -> float | None:
        return ratio(self.in_time, self.in_time + self.misses)

    @property
    def waste(self) -> float | None:
        return ratio(self.wasted, self.begun)


class Predictor(Protocol):
    """Layers are counted among those that are not pinned; experts [.., top_k] by falling logit."""

    def begin(self, tokens: np.ndarray) -> np.ndarray:
        """A pass over these tokens begins: experts [n, layers, top_k]; n may be 0."""
        ...

    def follow(self, layer: int, chosen: np.ndarray) -> np.ndarray:
        """A layer routed its rows to chosen [rows, top_k]: what the next may need [rows, top_k]."""
        ...

    def learn(self, tokens: np.ndarray, experts: np.ndarray) -> None:
        """Rows were committed: tokens [rows], experts [rows, layers, top_k]."""


class _Nothing:
    """No guess; others are this one and something."""

    def __init__(self, layers: int, experts: int, top_k: int, vocab: int) -> None:
        self._none = np.zeros((0, layers, top_k), np.int64)

    def begin(self, tokens: np.ndarray) -> np.ndarray:
        return self._none

    def follow(self, layer: int, chosen: np.ndarray) -> np.ndarray:
        return self._none[:, 0]

    def learn(self, tokens: np.ndarray, experts: np.ndarray) -> None:
        pass


class _Previous(_Nothing):
    def __init__(self, layers: int, experts: int, top_k: int, vocab: int) -> None:
        super().__init__(layers, experts, top_k, vocab)
        self._last = self._none

    def begin(self, tokens: np.ndarray) -> np.ndarray:
        return self._last

    def learn(self, tokens: np.ndarray, experts: np.ndarray) -> None:
        self._last = experts[-1:]


class _ByToken(_Nothing):
    def __init__(self, layers: int, experts: int, top_k: int, vocab: int) -> None:
        super().__init__(layers, experts, top_k, vocab)
        self._table = TokenTable(table_tokens(vocab, layers, top_k), layers, top_k)

    def begin(self, tokens: np.ndarray) -> np.ndarray:
        return self._table.find(tokens)

    def learn(self, tokens: np.ndarray, experts: np.ndarray) -> None:
        self._table.learn(tokens, experts)


class _ByLayer(_Nothing):
    def __init__(self, layers: int, experts: int, top_k: int, vocab: int) -> None:
        super().__init__(layers, experts, top_k, vocab)
        self._counts = np.zeros((max(layers - 1, 0), experts, experts), np.int32)

    def follow(self, layer: int, chosen: np.ndarray) -> np.ndarray:
        scores = self._counts[layer][chosen].sum(axis=1)
        if not scores.any():
            return self._none[:, 0]
        return np.argsort(-scores, axis=1, kind="stable")[:, : chosen.shape[1]]

    def learn(self, tokens: np.ndarray, experts: np.ndarray) -> None:
        for layer, counts in enumerate(self._counts):
            before, after = experts[:, layer, :, None], experts[:, layer + 1, None, :]
            np.add.at(counts, (before, after), 1)


_MADE: Mapping[str, type[_Nothing]] = {
    "off": _Nothing,
    "previous": _Previous,
    "draft": _ByToken,
    "layer": _ByLayer,
}


def foresee(log: RoutingLog, setting: Setting, predictor: str) -> Foreseen:
    """Replay a log with a predictor; PlanError for pins or slots out of range."""
    return _Replay(log, setting, predictor).run()


class _Replay:
    def __init__(self, log: RoutingLog, setting: Setting, predictor: str) -> None:
        self.log, self.setting, self.name = log, setting, predictor
        self.trace, header = Trace.of(log), log.header
        self.admissions: dict[int, Admission] = {}  # by place in the header
        for group in groups(self.trace, setting):
            policy = make_policy(setting.policy, group.slots)
            table = SlotTable(group.slots, header.experts, group.quotas, policy)
            self.admissions |= dict.fromkeys(group.layers, Admission(table, Instant(table)))
        self.layers = sorted(self.admissions)
        vocab = int(log.rows["token"].max()) + 1
        shape = len(self.layers), header.experts, header.top_k, vocab
        self.predictor: Predictor = _MADE[predictor](*shape)
        self.guesses = Guesses(self.layers)
        self.named: dict[int, np.ndarray] = {}
        self.counts = dict.fromkeys(
            ("hits", "misses", "guesses", "right", "asked", "begun", "in_time", "bytes_read"), 0
        )

    def run(self) -> Foreseen:
        log, start = self.log, self.log.starts
        for at in range(log.passes):
            self._pass(
                log.rows[start[at] : start[at + 1]], log.committed[start[at] : start[at + 1]]
            )
        tables = {id(one.table): one.table for one in self.admissions.values()}.values()
        wasted = sum(sum(table.unused.values()) for table in tables)
        return Foreseen(
            predictor=self.name,
            setting=self.setting,
            wasted=wasted,
            tokens=self.trace.tokens,
            **self.counts,
        )

    def _pass(self, rows: np.ndarray, committed: np.ndarray) -> None:
        experts = rows["experts"][:, self.layers].astype(np.int64)
        tree = not rows["flags"][0] & PROMPT
        if tree:
            found = self.predictor.begin(rows["token"])
            for at, layer in enumerate(self.layers):
                self._guess(layer, found[:, at])
        for at, layer in enumerate(self.layers):
            self._ask(layer, np.unique(experts[:, at]).astype(np.int32), tree)
            if tree and layer != self.layers[-1]:
                self._guess(self.layers[at + 1], self.predictor.follow(at, experts[:, at]))
        for at, layer in enumerate(self.layers):
            self.admissions[layer].table.touch(layer, experts[committed, at])
        if committed.any():
            self.predictor.learn(rows["token"][committed], experts[committed])

    def _guess(self, layer: int, experts: np.ndarray) -> None:
        if not len(experts):
            return
        ids = experts.T.ravel()
        self.named[layer] = np.unique(ids)
        chance, most = self.guesses.chance(self.name), self.guesses.most(layer)
        begun = self.admissions[layer].ahead(layer, ids, chance, most)
        if len(begun):
            self.guesses.begun(layer, self.name, begun)
            self._count(begun=len(begun), bytes_read=len(begun) * self._each(layer))

    def _ask(self, layer: int, needed: np.ndarray, tree: bool) -> None:
        admission, named = self.admissions[layer], self.named.pop(layer, needed[:0])
        asked = admission.ask(layer, needed)
        missed = len(asked.missing)
        self.guesses.asked(layer, needed, missed, tree)
        self._count(hits=len(asked.hits), misses=missed, in_time=asked.early)
        self._count(bytes_read=missed * self._each(layer))
        if tree:
            right = len(np.intersect1d(named, needed))
            self._count(asked=len(needed), guesses=len(named), right=right)
        for _ in admission.waves(asked):
            pass

    def _each(self, layer: int) -> int:
        return self.log.header.disk_bytes[layer]

    def _count(self, **amounts: int) -> None:
        for name, amount in amounts.items():
            self.counts[name] += amount
