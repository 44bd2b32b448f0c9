"""Prefetcher: guesses which experts the next layers will need, and has them read ahead.

draft: before a pass, from its tokens: the experts that each was routed to when it was last
    committed (target/token_table.py). In plain decoding the one token is known as well.
layer: within a pass, from the router of the next unpinned layer on what enters the feed-forward
    of this one. Read back together with this layer's routing: no wait of its own, and none in
    pinned layers.
auto: both and none of them in turns, then the fastest (target/trial.py).

Guesses are made for trees; a prompt's rows need nearly all experts, which no guess tells apart.
How many experts are read ahead for a layer in a pass: as many as it lately missed in one, or, under
a cap in bytes, whatever fits it. What a guess may evict is decided in target/slots.py, by the share
of this way's guesses that came true (target/guesses.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from specdec.target.expert_cache import ExpertCache
from specdec.target.guesses import Guesses
from specdec.target.token_table import TokenTable, table_tokens
from specdec.target.trial import OFF, Trial

DRAFT, LAYER, AUTO = "draft", "layer", "auto"


@dataclass(frozen=True)
class PrefetchUse:
    """What was done since the last reset. way: as asked for. passes: of trees, by what foresaw
    them. words: what "auto" decided, in order."""

    way: str
    passes: Mapping[str, int]
    words: tuple[str, ...]


class Prefetcher:
    """Of one target."""

    def __init__(self, cache: ExpertCache, vocab: int) -> None:
        """vocab: tokens of the model. How to prefetch says cache.streaming."""
        how, store = cache.streaming, cache.store
        self.cache, self.how = cache, how.prefetch
        self.layers = [layer for layer in store.layers if not cache.is_pinned(layer)]
        self._cap = how.prefetch_bytes
        self._each = {layer: store.geometry(layer).bytes_on_disk for layer in self.layers}
        self._table: TokenTable | None = None
        self._trial = Trial((DRAFT, LAYER)) if self.how == AUTO else None
        if not self.layers:
            self.how, self._trial = OFF, None
        if self.how in (DRAFT, AUTO):
            top_k, every = store.config.top_k, len(store.layers)
            tokens = table_tokens(vocab, every, top_k)
            self._table = TokenTable(tokens, len(self.layers), top_k)
        self.guesses = Guesses(self.layers)
        if self.how != OFF:
            cache.observers.append(self._asked)
        self.reset()

    def reset(self) -> None:
        """Count from zero, outside any pass; what was learnt stays."""
        self._running = False
        self._passes: dict[str, int] = {}
        self._told = len(self._trial.words) if self._trial else 0

    def use(self) -> PrefetchUse:
        words = tuple(self._trial.words[self._told :]) if self._trial else ()
        return PrefetchUse(self.how, dict(self._passes), words)

    @property
    def tokens(self) -> int:
        """Tokens that the routing table knows."""
        return len(self._table) if self._table is not None else 0

    @property
    def way(self) -> str:
        """What foresees the pass at hand."""
        return self._trial.way if self._trial is not None else self.how

    def foresee(self, tokens: np.ndarray) -> None:
        """A pass over a tree of these tokens is to come, maybe with more of them."""
        if self.how == OFF:
            return
        if not self._running:
            self._running = True  # a pass of a tree is foreseen or under way
            self._left = self._cap
            self._before = self._costs()
        if self.way != DRAFT or self._table is None:
            return
        found = self._table.find(np.asarray(tokens))
        for at, layer in enumerate(self.layers):
            self._guess(layer, found[:, at].T.ravel(), DRAFT)

    def looks_ahead(self) -> bool:
        """Whether the layers of the pass at hand are to say what the next one will need."""
        return self._running and self.way == LAYER

    def guess(self, layer: int, experts: np.ndarray) -> None:
        """What the layer's router says ahead of time: int [rows, top_k], by falling logit."""
        self._guess(layer, experts.T.ravel(), LAYER)

    def passed(self) -> None:
        """The pass is over."""
        if not self._running:
            return
        self._running = False
        self._passes[self.way] = self._passes.get(self.way, 0) + 1
        if self._trial is not None:
            end, stall, requests = self._costs()
            start, waited, before = self._before
            if requests >= before:  # else the counters were reset meanwhile
                self._trial.passed(end - start, stall - waited, requests - before)

    def learn(self, tokens: np.ndarray, chosen: Mapping[int, np.ndarray]) -> None:
        """Rows were committed: tokens [rows]; per layer, the experts of each [rows, top_k]."""
        if self._table is not None and len(tokens):
            experts = np.stack([chosen[layer] for layer in self.layers], axis=1)
            self._table.learn(np.asarray(tokens), experts)

    def _guess(self, layer: int, experts: np.ndarray, way: str) -> None:
        each = self._each[layer]
        most = self.guesses.most(layer) if self._left is None else self._left // each
        if most < 1 or not len(experts):
            return
        begun = self.cache.prefetch(layer, experts, self.guesses.chance(way), most)
        if len(begun):
            self.guesses.begun(layer, way, begun)
            if self._left is not None:
                self._left -= len(begun) * each

    def _asked(self, layer: int, needed: np.ndarray, missing: np.ndarray) -> None:
        self.guesses.asked(layer, needed, len(missing), self._running)

    def _costs(self) -> tuple[float, float, int]:
        """The time, seconds waited for reads so far, and requests of unpinned layers."""
        return perf_counter(), self.cache.waited()[1], sum(self.cache.slot_requests())
