"""Rig: the engine led along a trace, so that a random model is asked what a real one would be.

Weights are random, so nobody could say what the router chooses or whether a draft is right. This is
therefore put in from outside, nothing in the engine changes: the router's logits are raised for the
experts of the trace, the target's logits for the text's next token, and the draft, after it has
done all its work, proposes a block that agrees with the text as often as a real one. A router that
is asked ahead of time (prefetch) names each of the trace's experts with the probability FORESIGHT,
and others picked like them in place of the rest.

The proposal is calibrated: in slot d of a block the text's token has the rank r with the very
probability that the proposal gives to rank r. The first rank's probability is drawn from a beta
distribution whose mean is AGREEMENT[d]: the share of drafts that are right in slot d when all
before were, of the demo pair (docs/measurements.md: acceptance 2.98 and 3.12 with chains of 4 and
6 nodes, 3.16 and 3.40 with best-first trees; this gives the same within 0.1).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import mlx.core as mx
import numpy as np

from scripts.streaming.trace import Trace
from specdec.checkpoint import Checkpoint
from specdec.draft.config import DraftConfig
from specdec.draft.model import Draft
from specdec.engine import Engine
from specdec.footprint import verify_rows
from specdec.kernels.array import Array, Backend, choose_backend
from specdec.kernels.executor import use_gpu_kernels
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm
from specdec.target.config import TargetConfig
from specdec.target.expert_cache import ExpertCache
from specdec.target.mlp import MoE
from specdec.target.model import Output, Target
from specdec.target.repacked_store import open_store
from specdec.target.streaming import Streaming
from specdec.tree.block import Block
from specdec.tree.draft_tree import DraftTree

AGREEMENT = (0.83, 0.72, 0.60, 0.53, 0.47)  # the last one from there on
CONCENTRATION = 1.6  # of the beta distribution
FORESIGHT = 0.8  # of the next layer's router; 0.74 to 0.89 are reported (colibri, BigMoeOnEdge#101)
RAISED = 64.0  # above every logit of a random model


@dataclass(frozen=True)
class Setting:
    """share: of all experts that are in memory together. budget: the largest that will be used."""

    share: float
    streaming: Streaming
    budget: int = 1


class Rig:
    """One engine and its trace. Positions of the text are positions of the trace."""

    def __init__(self, model: Path, setting: Setting, draft: Path | None = None) -> None:
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
        self.cache.load_pinned()
        loaded = None
        if drafting is not None:
            loaded = Draft.load(*drafting, self.target.embedding, self.target.head, self.backend)
        self.engine = Engine(self.target, loaded)
        self.layers = store.layers
        self.expert_bytes = store.geometry(store.layers[0]).bytes_on_disk
        self.script = Script(self.layers, self.backend)
        self._direct()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._open.close()

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
        every: list[Any] = [one.mlp for one in self.target.layers if isinstance(one.mlp, MoE)]
        for moe in every:
            if moe.ahead is not None:
                prefetcher, after = moe.ahead
                guess = _Gates(after.gates, after.layer, self.script, FORESIGHT)
                like = {name: getattr(after, name) for name in ("norm", "top_k", "normalize")}
                moe.ahead = prefetcher, SimpleNamespace(gates=guess, layer=after.layer, **like)
        for moe in every:
            moe.gates = _Gates(moe.gates, moe.layer, self.script)
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

        target.verify = verified  # type: ignore[method-assign]
        target.prefill = prefilled  # type: ignore[method-assign]
        if engine.draft is not None:
            draft = engine.draft
            propose = draft.propose

            def proposed(bonus: int, width: int, slots: int | None = None) -> Block:
                return script.agree(propose(bonus, width, slots), draft.length)

            draft.propose = proposed  # type: ignore[method-assign]


class Script:
    """What the trace says of the pass that is under way."""

    def __init__(self, layers: Sequence[int], backend: Backend) -> None:
        self.trace: Trace | None = None
        self.first = 0  # the trace's position of the text's first token
        self.chosen: list[int | None] = []  # each row's next token, None below a wrong one
        self._backend = backend
        self._places = {layer: at for at, layer in enumerate(layers)}
        self._experts = np.zeros((0, 0, 0), np.int32)  # [rows, layers, top_k]
        self._at = 0  # the trace's position of the pass's first row

    def enter(self, tree: DraftTree, length: int) -> None:
        """A pass over a tree (or a prompt's chunk) after `length` tokens begins."""
        trace = self.trace
        assert trace is not None
        right: list[bool] = []
        rows, self.chosen, self._at = [], [], self.first + length
        for row in range(tree.rows):
            at = self.first + length + int(tree.depths[row])
            above = row == 0 or right[tree.parents[row]]
            token = int(tree.tokens[row])
            right.append(above and token == int(trace.tokens[at]))
            rows.append(trace.row(at, token, right[-1]))
            self.chosen.append(int(trace.tokens[at + 1]) if right[-1] else None)
        assert right[0], "the text left the trace"
        self._experts = np.stack(rows)

    def route(self, layer: int, logits: Piece, sure: float = 1.0) -> Piece:
        """The router's logits, those of the trace's experts raised above all others; with `sure`
        below 1 so many of them, and others for the rest."""
        experts = self._experts[:, self._places[layer]]
        if sure < 1:
            experts = self._guessed(layer, experts, sure)
        raised = np.zeros((len(experts), logits.width), np.float32)
        np.put_along_axis(raised, experts, RAISED, axis=1)
        values = logits.values
        add = raised if isinstance(values, np.ndarray) else mx.array(raised).astype(values.dtype)
        return Piece(values + add, 0, logits.width)

    def _guessed(self, layer: int, experts: np.ndarray, sure: float) -> np.ndarray:
        assert self.trace is not None
        rng = np.random.default_rng((layer, *experts.ravel().tolist()))
        kept = rng.random(experts.shape) < sure
        others = [self.trace.like(rng, self._places[layer], self._at, []) for _ in experts]
        guessed = []
        for row, other, keep in zip(experts, others, kept, strict=True):
            wrong = [one for one in other.tolist() if one not in row]
            wrong += [one for one in range(self.trace.shape.experts) if one not in {*row, *wrong}]
            guessed.append([*row[keep].tolist(), *wrong][: len(row)])
        return np.array(guessed, np.int32)

    def after(self, output: Output) -> Output:
        """The target's logits, the text's next token raised above all others."""
        logits = output.logits
        for row, token in enumerate(self.chosen):
            if token is not None:
                logits[row, token] = 1e9
        return Output(logits, output.taps)

    def agree(self, block: Block, length: int) -> Block:
        """A block like the one proposed, that agrees with the text as the module says."""
        trace = self.trace
        assert trace is not None
        tokens, log_probs = np.empty_like(block.tokens), np.empty_like(block.log_probs)
        for slot in range(block.slots):
            rng = np.random.default_rng((self.first + length, slot))
            mean = AGREEMENT[min(slot, len(AGREEMENT) - 1)]
            sure = rng.beta(CONCENTRATION * mean, CONCENTRATION * (1 - mean))
            # the second rank has half of what is left, the third half of that ...
            rest = (1 - sure) * 0.5 ** np.arange(1, block.width)
            shares = np.maximum(np.concatenate([[sure], rest]), 1e-12)
            ranked = -np.sort(-shares)
            others = rng.choice(trace.shape.vocabulary - 1, 2 * block.width + 1, replace=False)
            at = self.first + length + slot + 1
            true = int(trace.tokens[at])
            others = others[others != true][: block.width]
            rank = int((rng.random() > np.cumsum(ranked)).sum())
            if rank < block.width:
                others[rank] = true
            tokens[slot], log_probs[slot] = others, np.log(ranked)
        return Block(tokens, np.minimum(log_probs, 0.0))


class _Gates:
    """A layer's router and shared gate, the router's part led by the script."""

    def __init__(self, gates: Any, layer: int, script: Script, sure: float = 1.0) -> None:
        self._gates, self._layer, self._script, self._sure = gates, layer, script, sure

    def __call__(self, x: Array, norm: Norm | None = None) -> list[Piece]:
        logits, *rest = self._gates(x, norm)
        return [self._script.route(self._layer, logits, self._sure), *rest]


def _chain(tokens: Sequence[int]) -> DraftTree:
    rows = len(tokens)
    parents = np.arange(-1, rows - 1, dtype=np.int32)
    return DraftTree(np.array(tokens, np.int32), parents, np.zeros(rows))
