"""The two ways through the layers: a prompt chunk, and a tree on top of the committed tokens.

A layer computes its projections and asks its pass for what depends on other tokens: attention,
convolution, recurrence. PromptPass stages the chunk's results, TreePass only collects what
committing a path would need. Neither touches the committed tokens before `commit`.
"""

from typing import Protocol

import mlx.core as mx
import numpy as np

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
    """What a layer needs to know about the other tokens; `index` counts layers of one kind.

    Shapes: queries [heads, rows, dim], keys and values [kv_heads, rows, dim] for attend; the
    gated delta operations as in kernels.gated_delta.
    """

    positions: np.ndarray  # int32 [rows]

    def attend(
        self, index: int, queries: mx.array, keys: mx.array, values: mx.array, scale: float
    ) -> mx.array: ...

    def convolve(self, index: int, x: mx.array, weight: mx.array) -> mx.array: ...

    def recur(
        self,
        index: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        log_decay: mx.array,
        beta: mx.array,
    ) -> mx.array: ...

    def used_experts(self, layer: int, chosen: np.ndarray) -> None:
        """Rows used these experts of an unpinned layer: chosen int [rows, top_k]."""
        ...


class PromptPass:
    """Consecutive rows directly after the committed tokens."""

    def __init__(self, state: State, rows: int) -> None:
        self.state, self.rows = state, rows
        self.positions = np.arange(state.length, state.length + rows, dtype=np.int32)
        self.chosen: dict[int, np.ndarray] = {}
        self._conv: dict[int, mx.array] = {}
        self._recurrent: dict[int, mx.array] = {}

    def attend(
        self, index: int, queries: mx.array, keys: mx.array, values: mx.array, scale: float
    ) -> mx.array:
        self.state.append(index, keys, values)
        end = self.state.length + self.rows
        seen = self.state.keys[index][:, :end], self.state.values[index][:, :end]
        return prefill_attention(queries, *seen, scale)

    def convolve(self, index: int, x: mx.array, weight: mx.array) -> mx.array:
        state = self.state.conv[index]
        self._conv[index] = mx.concatenate([state, x], axis=0)[self.rows :]
        return convolve_prompt(x, state, weight)

    def recur(
        self,
        index: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        log_decay: mx.array,
        beta: mx.array,
    ) -> mx.array:
        y, self._recurrent[index] = recur_prompt(
            queries, keys, values, log_decay, beta, self.state.recurrent[index]
        )
        return y

    def used_experts(self, layer: int, chosen: np.ndarray) -> None:
        self.chosen[layer] = chosen

    def commit(self) -> dict[int, np.ndarray]:
        """Make the chunk part of the state; returns the experts used per unpinned layer."""
        state = self.state
        if self._conv:
            layers = range(len(state.conv))
            state.conv = [mx.contiguous(self._conv[index]) for index in layers]
            state.recurrent = mx.stack([self._recurrent[index] for index in layers])
        mx.eval(state.arrays())
        state.length += self.rows
        return self.chosen


class TreePass:
    """A tree's rows, each after the committed tokens and its own ancestors."""

    def __init__(self, state: State, tree: TreeLayout) -> None:
        self.state, self.tree = state, tree
        self.positions = (state.length + tree.depths).astype(np.int32)
        self.layout = AttentionLayout.of(tree, state.length)
        self.chosen: dict[int, np.ndarray] = {}
        self._new: dict[int, tuple[mx.array, mx.array]] = {}
        self._inputs: dict[int, mx.array] = {}
        self._tapes: dict[int, Tape] = {}
        if state.conv:
            taps = state.conv[0].shape[0] + 1
            self._windows = tree.windows(taps)
            self._window_index = mx.array(self._windows)

    def attend(
        self, index: int, queries: mx.array, keys: mx.array, values: mx.array, scale: float
    ) -> mx.array:
        self._new[index] = keys, values
        committed = self.state.keys[index], self.state.values[index]
        return tree_attention(queries, *committed, keys, values, self.layout, scale)

    def convolve(self, index: int, x: mx.array, weight: mx.array) -> mx.array:
        self._inputs[index] = x
        return convolve(x, self.state.conv[index], self._window_index, weight)

    def recur(
        self,
        index: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        log_decay: mx.array,
        beta: mx.array,
    ) -> mx.array:
        decay = mx.exp(log_decay)
        state = self.state.recurrent[index]
        y, delta = recur_tree(queries, keys, values, decay, beta, state, self.tree)
        self._tapes[index] = Tape(delta, keys, decay)
        return y

    def used_experts(self, layer: int, chosen: np.ndarray) -> None:
        self.chosen[layer] = chosen

    def arrays(self) -> list[mx.array]:
        """What commit will read, to evaluate together with the logits."""
        tapes = self._tapes.values()
        return [
            *(array for pair in self._new.values() for array in pair),
            *self._inputs.values(),
            *(array for tape in tapes for array in (tape.delta, tape.keys, tape.decay)),
        ]

    def commit(self, path: list[int]) -> dict[int, np.ndarray]:
        """Make a path from the root part of the state; returns its rows' experts per layer."""
        assert path[0] == 0
        assert all(
            self.tree.parents[row] == above for above, row in zip(path, path[1:], strict=False)
        )
        state, rows = self.state, mx.array(path)
        for index, (keys, values) in self._new.items():
            state.append(index, keys[:, rows], values[:, rows])
        if self._tapes:
            layers = range(len(state.conv))
            # The window of a token after the path's last row, less that token itself.
            window = mx.array(self._windows[path[-1]][1:])
            state.conv = [
                mx.concatenate([state.conv[index], self._inputs[index]], axis=0)[window]
                for index in layers
            ]
            state.recurrent = replay(
                state.recurrent, [self._tapes[index] for index in layers], path
            )
        mx.eval(state.arrays())
        state.length += len(path)
        return {layer: chosen[path] for layer, chosen in self.chosen.items()}
