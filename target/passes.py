"""The two ways through the layers: a prompt chunk, and a tree on top of the committed tokens.

A layer computes its projections and asks its pass for what depends on other tokens: attention,
convolution, recurrence. A pass collects what committing will need and leaves the committed tokens
as they are until `commit`.
"""

from itertools import pairwise
from typing import Protocol

import numpy as np

from specdec.kernels.array import Array, concatenate, contiguous
from specdec.kernels.attention import AttentionLayout, prefill_attention, tree_attention
from specdec.kernels.gated_delta import (
    Tape,
    convolve,
    convolve_prompt,
    recur_prompt,
    recur_tree,
    replay,
)
from specdec.kernels.layout import TreeLayout
from specdec.target.state import State


class Pass(Protocol):
    """What a layer asks of the other tokens; `index` counts layers of one kind.

    Shapes as in kernels.attention (keys and values [kv_heads, rows, dim]) and kernels.gated_delta.
    """

    positions: np.ndarray  # int32 [rows]
    chosen: dict[int, Array]  # MoE layer -> experts of each row, int32 [rows, top_k]

    def attend(
        self, index: int, queries: Array, keys: Array, values: Array, scale: float
    ) -> Array: ...

    def convolve(self, index: int, x: Array, weight: Array) -> Array: ...

    def recur(
        self, index: int, queries: Array, keys: Array, values: Array, log_decay: Array, beta: Array
    ) -> Array: ...

    def again(self) -> "Pass":
        """A fresh pass over the same rows."""
        ...


class PromptPass:
    """Consecutive rows directly after the committed tokens."""

    def __init__(self, state: State, rows: int) -> None:
        self.state, self.rows = state, rows
        self.positions = np.arange(state.length, state.length + rows, dtype=np.int32)
        self.chosen: dict[int, Array] = {}
        self._conv: dict[int, Array] = {}
        self._recurrent: dict[int, Array] = {}

    def again(self) -> "PromptPass":
        return PromptPass(self.state, self.rows)

    def attend(self, index: int, queries: Array, keys: Array, values: Array, scale: float) -> Array:
        state = self.state
        state.stage(index, keys, values)
        return prefill_attention(
            queries, state.keys[index], state.values[index], state.length, scale
        )

    def convolve(self, index: int, x: Array, weight: Array) -> Array:
        state = self.state.conv[index]
        # Only these rows: a slice would keep the chunk's array until the commit.
        self._conv[index] = contiguous(concatenate([state, x])[self.rows :])
        return convolve_prompt(x, state, weight)

    def recur(
        self, index: int, queries: Array, keys: Array, values: Array, log_decay: Array, beta: Array
    ) -> Array:
        y, self._recurrent[index] = recur_prompt(
            queries, keys, values, log_decay, beta, self.state.recurrent[index]
        )
        return y

    def commit(self) -> None:
        """Make the chunk part of the state."""
        layers = range(len(self._conv))
        conv = [self._conv[index] for index in layers]
        self.state.advance(self.rows, conv, [self._recurrent[index] for index in layers])


class TreePass:
    """A tree's rows, each after the committed tokens and its own ancestors."""

    def __init__(self, state: State, tree: TreeLayout) -> None:
        self.state, self.tree = state, tree
        self.positions = (state.length + tree.depths).astype(np.int32)
        self.chosen: dict[int, Array] = {}
        self._attention = AttentionLayout(tree, state.length)
        self._inputs: dict[int, Array] = {}
        self._tapes: dict[int, Tape] = {}
        taps = state.conv[0].shape[0] + 1 if state.conv else 1
        self._windows = tree.windows(taps)

    def again(self) -> "TreePass":
        return TreePass(self.state, self.tree)

    def attend(self, index: int, queries: Array, keys: Array, values: Array, scale: float) -> Array:
        self.state.stage(index, keys, values)
        buffers = self.state.keys[index], self.state.values[index]
        return tree_attention(queries, *buffers, self._attention, scale)

    def convolve(self, index: int, x: Array, weight: Array) -> Array:
        self._inputs[index] = x
        return convolve(x, self.state.conv[index], self._windows, weight)

    def recur(
        self, index: int, queries: Array, keys: Array, values: Array, log_decay: Array, beta: Array
    ) -> Array:
        y, self._tapes[index] = recur_tree(
            queries, keys, values, log_decay, beta, self.state.recurrent[index], self.tree
        )
        return y

    def arrays(self) -> list[Array]:
        """What commit will read, to evaluate together with the logits."""
        tapes = [array for tape in self._tapes.values() for array in (*tape.rows, tape.last)]
        kept = [*self.state.keys, *self.state.values, *self._inputs.values(), *tapes]
        return [array for array in kept if array is not None]

    def commit(self, path: list[int]) -> None:
        """Make a path from the root part of the state."""
        assert path[0] == 0
        assert all(self.tree.parents[row] == above for above, row in pairwise(path))
        state = self.state
        state.keep(path)
        layers = range(len(self._tapes))
        # The window of a token after the path's last row, less that token itself.
        window = state.backend.index(self._windows[path[-1]][1:])
        conv = [concatenate([state.conv[i], self._inputs[i]])[window] for i in layers]
        recurrent = replay(state.recurrent, [self._tapes[i] for i in layers], path)
        state.advance(len(path), conv, recurrent)
