"""Script: what a random model is told to choose, so that it is asked what a real one would be.

Weights are random, so nobody could say what the router chooses or whether a draft is right. This is
therefore put in from outside, nothing in the engine changes: the router's logits are raised for the
experts of the trace, the target's logits for the text's next token, and the draft, after it has
done all its work, proposes a block that agrees with the text as often as a real one. A router that
is asked ahead of time (prefetch) names each of the trace's experts with the probability FORESIGHT,
and others picked like them in place of the rest.

The proposal is calibrated: in slot d of a block the text's token has the rank r with the very
probability that the proposal gives to rank r. The first rank's probability is drawn from a beta
distribution whose mean is AGREEMENT[d]: the share of drafts that are right in slot d when all
before were, of an earlier draft of the demo pair (acceptance 2.98 and 3.12 with chains of 4 and 6
nodes, 3.16 and 3.40 with best-first trees; this gives the same within 0.1).
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from scripts.streaming.trace import Trace
from specdec.kernels.array import Array
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm
from specdec.target.model import Output
from specdec.tree.block import Block
from specdec.tree.draft_tree import DraftTree

AGREEMENT = (0.83, 0.72, 0.60, 0.53, 0.47)  # the last one from there on
LEAST = 0.34  # of the first rank's probability
CONCENTRATION = 1.6  # of the beta distribution
FORESIGHT = 0.8  # of the next layer's router; 0.74 to 0.89 are reported (colibri, BigMoeOnEdge#101)
RAISED = 64.0  # above every logit of a random model


class Script:
    """What the trace says of the pass that is under way."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.trace: Trace | None = None
        self.first = 0  # the trace's position of the text's first token
        self.chosen: list[int | None] = []  # each row's next token, None below a wrong one
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
        return Output(logits, output.tapped)

    def agree(self, block: Block, length: int) -> Block:
        """A block like the one proposed, that agrees with the text as the module says."""
        trace = self.trace
        assert trace is not None
        tokens, log_probs = np.empty_like(block.tokens), np.empty_like(block.log_probs)
        for slot in range(block.slots):
            rng = np.random.default_rng((self.first + length, slot))
            mean = AGREEMENT[min(slot, len(AGREEMENT) - 1)]
            # The second rank has half of what the first leaves, the third half of that, and so on:
            # the first stays the first if it has more than a third.
            part = (mean - LEAST) / (1 - LEAST)
            drawn = rng.beta(CONCENTRATION * part, CONCENTRATION * (1 - part))
            sure = LEAST + (1 - LEAST) * drawn
            rest = (1 - sure) * 0.5 ** np.arange(1, block.width)
            ranked = np.maximum(np.concatenate([[sure], rest]), 1e-12)
            others = rng.choice(trace.shape.vocabulary - 1, 2 * block.width + 1, replace=False)
            at = self.first + length + slot + 1
            true = int(trace.tokens[at])
            others = others[others != true][: block.width]
            rank = int((rng.random() > np.cumsum(ranked)).sum())
            if rank < block.width:
                others[rank] = true
            tokens[slot], log_probs[slot] = others, np.log(ranked)
        return Block(tokens, np.minimum(log_probs, 0.0))


class Gates:
    """A layer's router and shared gate, the router's part led by the script."""

    def __init__(self, gates: Any, layer: int, script: Script, sure: float = 1.0) -> None:
        self._gates, self._layer, self._script, self._sure = gates, layer, script, sure

    def __call__(self, x: Array, norm: Norm | None = None) -> list[Piece]:
        logits, *rest = self._gates(x, norm)
        return [self._script.route(self._layer, logits, self._sure), *rest]
