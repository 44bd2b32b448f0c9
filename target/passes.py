"""The two ways through the layers: a prompt chunk, and a tree on top of the committed tokens.

A layer computes its projections and asks its pass for what depends on other tokens: attention, and
the mixing of a gated delta layer. A pass collects what committing will need and leaves the
committed tokens as they are until `commit`.
"""

from abc import ABC, abstractmethod
from copy import copy
from itertools import pairwise
from typing import Protocol, TypeAlias

import numpy as np

from specdec.kernels.array import Array, evaluate, start
from specdec.kernels.attention import AttentionLayout, prefill_attention, tree_attention
from specdec.kernels.attention_inputs import AttentionShape
from specdec.kernels.gated_delta import (
    DeltaInputs,
    DeltaWeights,
    Tape,
    mix_prompt,
    mix_tree,
    replay,
)
from specdec.kernels.layout import TreeLayout
from specdec.kernels.linear import Piece
from specdec.target.grown_tree import GrownTree
from specdec.target.state import Projected, State

# experts by MoE layer, the rows and the last of each tape by gated delta layer, and what was staged
# by full-attention layer
Results: TypeAlias = tuple[
    dict[int, Array],
    dict[int, tuple[tuple[Array, ...], tuple[Array, Array] | None]],
    dict[int, tuple[Array, Array]],
]


class Turns(Protocol):
    """A Rope, or what stands for one."""

    def rows(self, positions: np.ndarray, like: Array) -> tuple[Array, Array]: ...

    def run(self, first: int, count: int) -> tuple[Array, Array]: ...


class Pass(ABC):
    """What a layer asks of the other tokens; `index` counts layers of one kind.

    Shapes as in kernels.attention (keys and values [kv_heads, rows, dim]) and kernels.gated_delta.
    """

    def __init__(self, state: State, rope: Turns, positions: np.ndarray) -> None:
        """positions: int32 [rows]."""
        self.state, self.positions, self._rope = state, positions, rope
        state.make_room(len(positions))
        self.chosen: dict[int, Array] = {}  # MoE layer -> experts of each row, int32 [rows, top_k]

    def turn(self, like: Array) -> tuple[Array, Array]:
        """cos and sin of the rows' positions, as kernels.rope gives them."""
        return self._rope.rows(self.positions, like)

    def attend(
        self,
        index: int,
        projected: Projected,
        shape: AttentionShape,
        turn: tuple[Array, Array],
        gate: Piece | None,
    ) -> Array:
        queries = self._stage(index, projected, shape, turn)
        buffers = self.state.keys[index], self.state.values[index]
        return self._attention(queries, *buffers, shape.dim**-0.5, gate)

    def _stage(
        self, index: int, projected: Projected, shape: AttentionShape, turn: tuple[Array, Array]
    ) -> Array:
        """The queries; keys and values are written behind the committed ones."""
        return self.state.stage(index, projected, shape, turn)[0]

    @abstractmethod
    def _attention(
        self, queries: Array, keys: Array, values: Array, scale: float, gate: Piece | None
    ) -> Array:
        """Of the rows over the buffers, their own keys and values staged."""

    @abstractmethod
    def mix(self, index: int, inputs: DeltaInputs, weights: DeltaWeights) -> Array: ...

    @abstractmethod
    def again(self) -> "Pass":
        """A fresh pass over the same rows."""


class PromptPass(Pass):
    """Consecutive rows directly after the committed tokens."""

    def __init__(self, state: State, rope: Turns, rows: int) -> None:
        super().__init__(state, rope, np.arange(state.length, state.length + rows, dtype=np.int32))
        self.rows = rows
        self._conv: dict[int, Array] = {}
        self._recurrent: dict[int, Array] = {}

    def again(self) -> "PromptPass":
        return PromptPass(self.state, self._rope, self.rows)

    def _attention(
        self, queries: Array, keys: Array, values: Array, scale: float, gate: Piece | None
    ) -> Array:
        return prefill_attention(queries, keys, values, self.state.length, scale, gate)

    def mix(self, index: int, inputs: DeltaInputs, weights: DeltaWeights) -> Array:
        state = self.state
        y, self._conv[index], self._recurrent[index] = mix_prompt(
            inputs, weights, state.conv[index], state.recurrent[index]
        )
        return y

    def commit(self) -> None:
        """Make the chunk part of the state."""
        layers = range(len(self._conv))
        conv = [self._conv[index] for index in layers]
        recurrent = [self._recurrent[index] for index in layers]
        evaluate(*self.state.keys, *self.state.values, *conv, *recurrent)
        self.state.advance(self.rows, conv, recurrent)


class TreePass(Pass):
    """A tree's rows, each after the committed tokens and its own ancestors."""

    def __init__(
        self,
        state: State,
        rope: Turns,
        tree: TreeLayout,
        grown: GrownTree | None = None,
        ahead: bool = False,
    ) -> None:
        """grown: a tree of which the host knows the size alone; until `known` another of as many
        rows stands for it. ahead: nor does the host know how many tokens are committed then."""
        super().__init__(state, rope, (state.length + tree.depths).astype(np.int32))
        self.tree, self.grown, self.ahead = tree, grown, ahead
        self.layout = AttentionLayout(tree, state.length)
        self._tapes: dict[int, Tape] = {}
        # But a lone root's is where it belongs, and so is what was written in place.
        self._staged: dict[int, tuple[Array, Array]] = {}

    def known(self) -> None:
        """Have `tree` be the tree itself; waits for it."""
        if self.grown is not None:
            self.tree = TreeLayout.of(self.grown.host.parents)
            self.positions = (self.state.length + self.tree.depths).astype(np.int32)
            on_device = self.layout.on_device
            self.layout = AttentionLayout(self.tree, self.state.length)
            self.layout.on_device.update(on_device)

    def turn_of_root(self) -> tuple[Array, Array]:
        """cos and sin of the root's position, on the device."""
        return self._rope.run(self.state.length, 1)

    def again(self) -> "TreePass":
        return TreePass(self.state, self._rope, self.tree)

    def _stage(
        self, index: int, projected: Projected, shape: AttentionShape, turn: tuple[Array, Array]
    ) -> Array:
        queries, rows = self.state.stage(index, projected, shape, turn)
        if rows is not None and self.tree.rows > 1:
            self._staged[index] = rows
        return queries

    def _attention(
        self, queries: Array, keys: Array, values: Array, scale: float, gate: Piece | None
    ) -> Array:
        return tree_attention(queries, keys, values, self.layout, scale, gate)

    def mix(self, index: int, inputs: DeltaInputs, weights: DeltaWeights) -> Array:
        state = self.state
        y, self._tapes[index] = mix_tree(
            inputs, weights, state.conv[index], state.recurrent[index], self.tree
        )
        return y

    def arrays(self) -> list[Array]:
        """What commit will read, to be computed together with the logits."""
        tapes = [array for tape in self._tapes.values() for array in tape.arrays]
        return [*self.state.keys, *self.state.values, *tapes]

    def results(self) -> Results:
        """What the layers left here, as plain containers of arrays."""
        tapes = {index: (tape.rows, tape.last) for index, tape in self._tapes.items()}
        return self.chosen, tapes, self._staged

    def take(self, results: Results) -> None:
        """Have `results` of a pass over an equal tree, of which some layers ran in place of this
        one's."""
        chosen, tapes, staged = results
        self.chosen.update(chosen)
        self._staged.update(staged)
        self._tapes.update({index: Tape(*parts) for index, parts in tapes.items()})

    def commit(self, path: list[int]) -> None:
        """Make a path from the root part of the state."""
        self.check(path)
        state = self.state
        state.keep(path, self.staged)
        conv, recurrent = self._after(path)
        if self.tree.rows > 1:  # else there is nothing to compute
            start(*state.keys, *state.values, *conv, *recurrent)
        state.advance(len(path), conv, recurrent)

    def check(self, path: list[int]) -> None:
        assert path[0] == 0
        assert all(self.tree.parents[row] == above for above, row in pairwise(path))

    @property
    def staged(self) -> list[tuple[Array, Array]]:
        """Keys and values [kv_heads, rows, head_dim] of the full-attention layers in order; none of
        a lone root, and where they were written in place alone."""
        return [self._staged[index] for index in sorted(self._staged)]

    @property
    def tapes(self) -> list[Tape]:
        """Of the gated delta layers in order."""
        return [self._tapes[index] for index in range(len(self._tapes))]

    def after_root(self) -> State:
        """The state once a lone root is committed, before it is; of the same buffers."""
        state = copy(self.state)
        state.advance(1, *self._after([0]))
        return state

    def _after(self, path: list[int]) -> tuple[list[Array], list[Array]]:
        """Convolution rows and recurrent states after a path."""
        conv, recurrent = self.state.conv, self.state.recurrent
        tapes = self.tapes
        return replay(conv, recurrent, tapes, path) if tapes else (conv, recurrent)
