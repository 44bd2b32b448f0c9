"""VerifyGraph: verify passes compiled by MLX, so that Python builds each kind of pass once.

On a GPU a pass of a large model is hundreds of launches, and building them in Python takes longer
than the GPU takes to run them. Passes over as many rows are one graph: all that differs between
them, the tree, the state and how much of it is committed, goes in as arrays. A pass that the GPU
waits for is several graphs, one behind the other: it runs the first layers while the host begins
the next.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from specdec.kernels.array import Array, start, to_numpy
from specdec.kernels.attention_inputs import AttentionShape, staged_inputs
from specdec.kernels.gpu.graphs import Graphs
from specdec.kernels.gpu.limits import MAX_ROWS, refused
from specdec.kernels.gpu.prepared import Prepared, prepare
from specdec.kernels.gpu.tree_program import place_of
from specdec.kernels.layout import TreeLayout
from specdec.target.config import TargetConfig
from specdec.target.passes import TreePass
from specdec.target.state import Projected, State

LAYERS = 6  # of a graph, about
FIRST = 4  # of the first one, which the GPU waits for

# Some layers of a pass: tokens or hidden rows, what was tapped so far, the pass -> the two again,
# of the last layers logits, taps and verdict.
Body = Callable[[range, Array, dict[int, Array], TreePass], tuple[Any, ...]]


class Refused(Exception):
    """A kernel does not take a pass of which the host does not know the length."""


class _Part(NamedTuple):
    """Layers of one graph, and where those of either kind stand in a state's lists."""

    span: range
    full: range
    linear: range


class VerifyGraph(Graphs):
    """A body, and the graphs its parts were compiled to."""

    def __init__(self, body: Body, config: TargetConfig) -> None:
        super().__init__()
        self._body, self._layers = body, range(config.num_layers)
        self._whole = [_part(config, 0, config.num_layers)]
        self._parts = [_part(config, *ends) for ends in pairwise(_ends(config.num_layers))]

    def __call__(self, tokens: Array, this: TreePass) -> tuple[Any, ...]:
        """What the body returns; the pass and its state are as if it had run on them."""
        # A reference reads the tree on the host, so its graph would be this very pass's alone.
        if refused or len(tokens) > MAX_ROWS:
            return self._uncompiled(tokens, this)
        made = self._prepared(tokens, this)
        rows: list[Any] = [made.tokens, {}]
        # What is begun ahead has a GPU that is at work, and so has the next lone root.
        waits = this.tree.rows > 1 and not this.ahead
        for part in self._parts if waits else self._whole:
            if part.span.start > 0:
                start(rows[0])
            rows = self._run(part, made, rows, this)
            if refused:  # while it was built
                self.clear()
                return self._uncompiled(tokens, this)
        return tuple(rows)

    def _uncompiled(self, tokens: Array, this: TreePass) -> tuple[Any, ...]:
        if this.ahead:
            raise Refused
        this.known()
        return self._body(self._layers, to_numpy(tokens), {}, this)

    def _prepared(self, tokens: Array, this: TreePass) -> Prepared:
        gdn = this.state.config.gdn
        if this.grown is not None:
            made = this.grown.made
            this.layout.on_device["paths"] = made.paths
            program = {} if gdn is None else {place_of(gdn.conv_kernel): made.program}
            return Prepared(made.tokens, made.turn, program)
        # the host's rows of a tree go the way of its numbers
        turn = this.turn_of_root() if this.tree.rows == 1 else this.turn(this.positions)
        return prepare(this.layout, None if gdn is None else gdn.conv_kernel, tokens, turn)

    def _run(self, part: _Part, made: Prepared, rows: list[Any], this: TreePass) -> list[Any]:
        """What the body returns for a part."""
        state, (span, full, linear) = this.state, part
        written = state.written
        trace = partial(self._trace, span, this.tree.parents, state.length)
        kind = this.tree.rows, state.capacity, span
        given = {
            "rows": rows,
            "turn": made.turn,
            "layout": this.layout.on_device,
            "tree": made.program,
            "order": written.order,
            "keys": {at: state.keys[at] for at in full},
            "values": {at: state.values[at] for at in full},
            "conv": {at: state.conv[at] for at in linear},
            "recurrent": {at: state.recurrent[at] for at in linear},
        }
        found, buffers, done, results = self.of(kind, trace)(given)
        if refused:  # while it was traced: nothing of it is to stay
            return list(found)
        for at, (keys, values) in buffers.items():
            state.keys[at], state.values[at] = keys, values
        for last in done:
            written.by(last)
        this.take(results)
        return list(found)

    def _trace(
        self, span: range, parents: np.ndarray, length: int, given: dict[str, Any]
    ) -> tuple[Any, ...]:
        """The body on placeholders. parents, length: those of any pass of this kind."""
        state = _Given(length, given)
        this = TreePass(state, _Turned(given["turn"]), TreeLayout(parents))
        this.layout.on_device.update(given["layout"])
        this.tree.on_device.update(given["tree"])
        x, tapped = given["rows"]
        outputs = self._body(span, x, tapped, this)
        return list(outputs), state.filled, state.done, this.results()


def _part(config: TargetConfig, first: int, end: int) -> _Part:
    full, linear = (
        range(*(sum(i < edge for i in kind) for edge in (first, end)))
        for kind in (config.full_layers, config.linear_layers)
    )
    return _Part(range(first, end), full, linear)


def _ends(layers: int) -> list[int]:
    """Where the graphs of a model begin and end."""
    if layers <= LAYERS:
        return [0, layers]
    count = max(1, round((layers - FIRST) / LAYERS))
    return [0, *(FIRST + (layers - FIRST) * n // count for n in range(count + 1))]


class _Turned:
    """A rope of which the rows are known."""

    def __init__(self, turn: tuple[Array, Array]) -> None:
        self._turn = turn

    def rows(self, positions: np.ndarray, like: Array) -> tuple[Array, Array]:
        return self._turn

    def run(self, first: int, count: int) -> tuple[Array, Array]:
        raise NotImplementedError


class _Given(State):
    """A state of placeholders, which stages behind a length that is one of them.

    filled: buffers that are new arrays, by layer; done: of the last layer that wrote in place.
    """

    def __init__(self, length: int, given: dict[str, Any]) -> None:
        self.length, self._tree = length, given["layout"]["paths"]
        self._order = given["order"]
        keys: Any = dict(given["keys"])  # of some layers
        values: Any = dict(given["values"])
        self.keys, self.values = keys, values
        self.conv, self.recurrent = given["conv"], given["recurrent"]
        self.filled: dict[int, tuple[Array, Array]] = {}
        self.done: list[Array] = []

    def make_room(self, rows: int) -> None:
        pass  # there is

    def stage(
        self,
        index: int,
        projected: Projected,
        shape: AttentionShape,
        turn: tuple[Array, Array],
    ) -> tuple[Array, tuple[Array, Array] | None]:
        buffers = self.keys[index], self.values[index]
        staged = staged_inputs(*projected, shape, *turn, buffers, self._tree, self._order)
        if staged.rows is None:
            self._order = staged.done
            self.done = [staged.done]
        else:
            self.keys[index], self.values[index] = self.filled[index] = staged.keys, staged.values
        return staged.queries, staged.rows
