"""VerifyGraph: verify passes compiled by MLX, so that Python builds each kind of pass once.

On a GPU a pass of a large model is hundreds of launches, and building them in Python takes longer
than the GPU takes to run them. Passes over as many rows are one graph: all that differs between
them, the tree, the state and how much of it is committed, goes in as arrays.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array
from specdec.kernels.gpu.graphs import Graphs
from specdec.kernels.gpu.limits import MAX_ROWS, refused
from specdec.kernels.gpu.prepared import prepare
from specdec.kernels.layout import TreeLayout
from specdec.target.passes import TreePass
from specdec.target.state import State

Body = Callable[[Array, TreePass], tuple[Any, ...]]


class VerifyGraph(Graphs):
    """A body, tokens int32 [rows] and a pass -> arrays and lists of them, and the graphs it was
    compiled to."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self._body = body

    def __call__(self, tokens: Array, this: TreePass) -> tuple[Any, ...]:
        """What the body returns; the pass and its state are as if it had run on them."""
        # A reference reads the tree on the host, so its graph would be this very pass's alone.
        if refused or len(tokens) > MAX_ROWS:
            return self._body(tokens, this)
        state, gdn = this.state, this.state.config.gdn
        made = prepare(this.layout, None if gdn is None else gdn.conv_kernel, tokens)
        kind = this.tree.rows, state.keys[0].shape[1] if state.keys else 0
        graph = self.of(kind, partial(self._trace, this.tree.parents, state.length))
        found = graph(
            {
                "tokens": made.tokens,
                "depths": made.depths,
                "turns": this.turns_from_root(),
                "layout": this.layout.on_device,
                "tree": this.tree.on_device,
                "keys": state.keys,
                "values": state.values,
                "conv": state.conv,
                "recurrent": state.recurrent,
            }
        )
        if refused:  # while it was built
            self.clear()
            return self._body(tokens, this)
        outputs, state.keys[:], state.values[:], results = found
        this.take(results)
        return tuple(outputs)

    def _trace(self, parents: np.ndarray, length: int, given: dict[str, Any]) -> tuple[Any, ...]:
        """The body on placeholders. parents, length: those of any pass of this kind."""
        state = _Given(length, given)
        cos, sin = given["turns"]
        if len(parents) > 1:
            cos, sin = cos[given["depths"]], sin[given["depths"]]
        this = TreePass(state, _Turned((cos, sin)), TreeLayout(parents))
        this.layout.on_device.update(given["layout"])
        this.tree.on_device.update(given["tree"])
        outputs = self._body(given["tokens"], this)
        return list(outputs), state.keys, state.values, this.results()


class _Turned:
    """A rope of which the rows are known."""

    def __init__(self, turn: tuple[Array, Array]) -> None:
        self._turn = turn

    def rows(self, positions: np.ndarray, like: Array) -> tuple[Array, Array]:
        return self._turn

    def run(self, first: int, count: int) -> tuple[Array, Array]:
        raise NotImplementedError


class _Given(State):
    """A state of placeholders, which stages behind a length that is one of them."""

    def __init__(self, length: int, given: dict[str, Any]) -> None:
        self.length, self._start = length, given["layout"]["paths"][0, 1:2]
        self.keys, self.values = list(given["keys"]), list(given["values"])
        self.conv, self.recurrent = given["conv"], given["recurrent"]

    def make_room(self, rows: int) -> None:
        pass  # there is

    def stage(self, index: int, keys: Array, values: Array) -> None:
        for buffers, new in ((self.keys, keys), (self.values, values)):
            buffers[index] = mx.slice_update(buffers[index], new, self._start, axes=(1,))
