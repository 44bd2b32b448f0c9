"""Rig: the engine led along a trace, so that a random model is asked what a real one would be.

Nothing in the engine changes: scripts/streaming/script.py says what is put in from outside, between
the engine and its parts.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np

from scripts.streaming.script import FORESIGHT, Gates, Script
from scripts.streaming.trace import Trace
from specdec.checkpoint import Checkpoint
from specdec.draft.config import DraftConfig
from specdec.draft.model import Draft
from specdec.engine import Engine
from specdec.footprint import verify_rows
from specdec.kernels.array import choose_backend
from specdec.kernels.executor import use_gpu_kernels
from specdec.target.config import TargetConfig
from specdec.target.expert_cache import ExpertCache
from specdec.target.mlp import MoE
from specdec.target.model import Output, Target
from specdec.target.prefetch import Prefetcher
from specdec.target.repacked_store import open_store
from specdec.target.streaming import PREFETCH, Streaming
from specdec.tree.block import Block
from specdec.tree.draft_tree import DraftTree


@dataclass(frozen=True)
class Setting:
    """share: of all experts that are in memory together. budget: the largest that will be used."""

    share: float
    streaming: Streaming
    budget: int = 1


class Rig:
    """One engine and its trace. Positions of the text are positions of the trace."""

    def __init__(
        self, model: Path, setting: Setting, draft: Path | None = None, like: "Rig | None" = None
    ) -> None:
        """like: another rig of the model, whose embedding and head are used here too."""
        self._open = ExitStack()
        self.backend = choose_backend(mx.bfloat16)
        use_gpu_kernels(self.backend.on_gpu)
        checkpoint = self._open.enter_context(Checkpoint.open(model))
        config = TargetConfig.of(checkpoint)
        store = open_store(checkpoint, config)
        pinned = store.layers if setting.share == 1 else ()
        slots = round(setting.share * len(store.layers) * store.num_experts)
        streaming = replace(setting.streaming, rows=verify_rows(setting.budget))
        self.cache = ExpertCache(store, pinned, slots, self.backend.dtype, streaming)
        drafting = None
        if draft is not None:
            source = self._open.enter_context(Checkpoint.open(draft))
            drafting = source, DraftConfig.from_dict(source.config, str(draft / "config.json"))
        taps = drafting[1].target_layer_ids if drafting else ()
        self.target = Target.load(checkpoint, config, self.cache, self.backend, taps)
        if like is not None:
            mine, other = self.target.model, like.target.model
            mine.embedding, mine.head = other.embedding, other.head
        self.cache.load_pinned()
        loaded = None
        if drafting is not None:
            loaded = Draft.load(*drafting, self.target.embedding, self.target.head, self.backend)
        self.engine = Engine(self.target, loaded)
        self.layers = store.layers
        self.expert_bytes = store.geometry(store.layers[0]).bytes_on_disk
        self.script = Script(self.layers)
        self._moes: list[Any] = [one.mlp for one in self.target.layers if isinstance(one.mlp, MoE)]
        self._prefetchers = {setting.streaming.prefetch: self.target.prefetcher}
        self._guessing = {
            moe.layer: SimpleNamespace(
                gates=Gates(moe.gates, moe.layer, self.script, FORESIGHT),
                **{name: getattr(moe, name) for name in ("layer", "norm", "top_k", "normalize")},
            )
            for moe in self._moes
        }
        self._direct()
        self.prefetch(setting.streaming.prefetch)

    def close(self) -> None:
        self._open.close()

    def prefetch(self, mode: str) -> None:
        """Prefetch in another way from now on; what each has learned stays with it."""
        assert mode in PREFETCH
        cache = self.cache
        if mode not in self._prefetchers:
            cache.streaming = replace(cache.streaming, prefetch=mode)
            self._prefetchers[mode] = Prefetcher(cache, self.target.config.vocab_size)
        one = self.target.prefetcher = self._prefetchers[mode]
        cache.observers[:] = [] if one.how == "off" else [one._asked]
        unpinned = [moe for moe in self._moes if not cache.is_pinned(moe.layer)]
        for moe, after in pairwise(unpinned):
            moe.ahead = one, self._guessing[after.layer]

    def play(self, trace: Trace, first: int, prompt: int, drafting: bool) -> None:
        """Prefill the trace's `prompt` tokens from `first` on; then its text is decoded."""
        self.script.trace, self.script.first = trace, first
        self.engine.prefill(trace.tokens[first : first + prompt].tolist(), drafting)

    def warm(self, trace: Trace, until: int) -> None:
        """Bring the slots to what an LRU cache holds after the trace's tokens before `until`:
        the experts they used last, the oldest first, are asked for, and nothing is computed."""
        if self.cache.all_pinned:
            return
        most, step = self.cache.slots // len(self.layers), trace.shape.top_k
        recent = [trace.recent(at, until, most) for at in range(len(self.layers))]
        for first in range((most - 1) // step * step, -1, -step):
            for layer, experts in zip(self.layers, recent, strict=True):
                asked = experts[first : first + step]
                for _ in self.cache.waves(layer, asked):
                    pass
                self.cache.touch(layer, asked)
        prefetcher: Any = self.target.prefetcher
        if prefetcher._table is not None:  # what a text before this one would have left there
            prefetcher._table.__init__(len(prefetcher._table._experts), len(self.layers), step)
            rows = {layer: trace.experts[:until, at] for at, layer in enumerate(self.layers)}
            prefetcher.learn(trace.tokens[:until], rows)

    def _direct(self) -> None:
        """Put the script between the engine and its parts."""
        for moe in self._moes:
            moe.gates = Gates(moe.gates, moe.layer, self.script)
        target, script, engine = self.target, self.script, self.engine
        verify, prefill = target.verify, target.prefill

        def verified(tree: DraftTree) -> Output:
            script.enter(tree, target.length)
            return script.after(verify(tree))

        def prefilled(tokens: Sequence[int], all_logits: bool = False) -> Output:
            script.enter(_chain(tokens), target.length)
            output = prefill(tokens, all_logits)
            script.chosen = script.chosen[-1:]
            return script.after(output)

        target.verify = verified  # type: ignore[method-assign, assignment]
        target.prefill = prefilled  # type: ignore[method-assign]
        if engine.draft is not None:
            draft = engine.draft
            propose = draft.propose

            def proposed(bonus: int, width: int, slots: int | None = None) -> Block:
                return script.agree(propose(bonus, width, slots), draft.length)

            draft.propose = proposed  # type: ignore[method-assign]


def _chain(tokens: Sequence[int]) -> DraftTree:
    rows = len(tokens)
    parents = np.arange(-1, rows - 1, dtype=np.int32)
    return DraftTree(np.array(tokens, np.int32), parents, np.zeros(rows))
