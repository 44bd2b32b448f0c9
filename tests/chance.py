"""A target and a draft that are tables: real engines, real samplers, no model.

The target's logits after a token depend on the two tokens before; everything else about it is what
the engine asks of a Target. So the distribution of a text can be written down, and thousands of
texts drawn in seconds.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np

from specdec.budget import Fixed
from specdec.engine import Engine
from specdec.target.model import Output
from specdec.tree.block import Block


class TableTarget:
    """logits of the next token = table[token before last, last token], over a small vocabulary."""

    compiled = False

    def __init__(self, vocab: int, seed: int = 0, spread: float = 1.5) -> None:
        self.vocab = vocab
        self.table = np.random.default_rng(seed).normal(0, spread, (vocab,) * 3).astype(np.float32)
        self.backend = SimpleNamespace(index=np.asarray, on_gpu=False)
        self.experts = SimpleNamespace(waited=lambda: (0, 0.0), slot_requests=lambda: ())
        self.reset()

    def reset(self) -> None:
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        return len(self.tokens)

    def prefill(self, tokens) -> Output:
        self.tokens.extend(tokens)
        return Output(self.after(self.tokens)[None], [np.zeros((len(tokens), 1))])

    def foresee(self, tree) -> None:
        pass

    def verify(self, tree) -> Output:
        self.tree = tree
        rows = [self.after([*self.tokens, *path(tree, row)]) for row in range(tree.rows)]
        return Output(np.array(rows), [np.zeros((tree.rows, 1))])

    def commit(self, rows) -> None:
        self.tokens.extend(self.tree.tokens[list(rows)].tolist())

    def after(self, tokens) -> np.ndarray:
        """Logits float32 [vocab] of the token after these."""
        return self.table[tokens[-2], tokens[-1]]


class TableDraft:
    """A draft whose slots are tables too: each slot's distribution by the bonus token."""

    def __init__(self, vocab: int, slots: int = 4, seed: int = 1, spread: float = 1.5) -> None:
        self.table = np.random.default_rng(seed).normal(0, spread, (vocab, slots, vocab))
        self.reset()

    def reset(self) -> None:
        self.length = 0

    compiled = False

    def extend(self, taps) -> None:
        self.length += len(taps)

    def propose(self, bonus: int, width: int, slots: int | None = None) -> Block:
        logs = self.table[bonus][:slots]
        logs = logs - np.log(np.exp(logs).sum(axis=1, keepdims=True))
        order = np.argsort(-logs, axis=1, kind="stable")[:, :width]
        return Block(order.astype(np.int32), np.take_along_axis(logs, order, axis=1))


def path(tree, row) -> list[int]:
    """The tokens from the root down to a row."""
    tokens: list[int] = []
    while row >= 0:
        tokens.insert(0, int(tree.tokens[row]))
        row = tree.parents[row]
    return tokens


def draw(engine: Engine, prompt, sampling, budget: int, kind: str, length: int) -> tuple[int, ...]:
    """The first `length` tokens of one text."""
    prefill = engine.prefill(prompt, budget > 1, None, sampling)
    assert prefill.token is not None
    tokens = [prefill.token]
    while len(tokens) < length:
        tokens.extend(engine.step(Fixed(budget), kind).tokens)
    return tuple(tokens[:length])


def table_engine(vocab: int = 4, seed: int = 0) -> Engine:
    target: Any = TableTarget(vocab, seed)
    draft: Any = TableDraft(vocab, seed=seed + 1)
    return Engine(target, draft)
