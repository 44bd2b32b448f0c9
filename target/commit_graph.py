"""CommitGraph: making a path part of the state, compiled by MLX, for verify passes that are graphs.

Passes over as many rows are one graph, whatever their trees and paths: which rows stand directly
behind the committed ones from now on goes in as an array, and so does the path that is replayed.
The rows are moved by a kernel where kernels write in place. Elsewhere they are taken from what was
staged, not from the buffers: MLX writes in place only into a buffer that nobody reads at the same
time, and would copy all of it.
"""

from copy import copy
from typing import Any

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array, start
from specdec.kernels.gated_delta import Tape, replay
from specdec.kernels.gpu.gated_delta import padded
from specdec.kernels.gpu.graphs import Graphs
from specdec.kernels.gpu.kept_rows import kept_rows
from specdec.kernels.gpu.limits import MAX_ROWS, refused
from specdec.target.passes import TreePass
from specdec.target.state import State


class CommitGraph(Graphs):
    """The graphs of one target."""

    def __call__(self, this: TreePass, path: list[int]) -> None:
        """What `this.commit(path)` does; begun, not waited for."""
        state, rows = this.state, this.tree.rows
        if refused or rows == 1 or rows > MAX_ROWS:
            this.commit(path)
            return
        this.check(path)
        moves = path != list(range(len(path)))
        # rows behind the path stay what they are
        places = [*path, *range(len(path), rows)]
        numbers = np.concatenate([padded(path), places, [state.length]]).astype(np.int32)
        staged = [list(part) for part in zip(*this.staged, strict=True)] if moves else []
        moved = _replayed if not moves else _moved if staged else _moved_in_place
        graph = self.of((rows, moves, state.capacity, bool(staged)), moved)
        found = graph(
            {
                "numbers": mx.array(numbers),
                "keys": state.keys if moves else [],
                "values": state.values if moves else [],
                "staged": staged,
                "order": state.written.order,
                "tree": this.layout.on_device.get("paths", []),
                "conv": state.conv,
                "recurrent": state.recurrent,
                "tapes": [tape.rows for tape in this.tapes],
            }
        )
        conv, recurrent, keys, values, done = found
        if staged:  # now: whoever holds what was there before keeps MLX from writing in place
            state.keys[:], state.values[:] = keys, values
        for last in done:
            state.written.by(last)
        start(*keys, *values, *done, *conv, *recurrent)
        state.advance(len(path), conv, recurrent)

    def ahead(self, this: TreePass, came: Array) -> State:
        """The state once the path is committed that a GPU found, before it is; of the same buffers.
        Begun with the pass that reads it. Only where kernels write in place.

        came: as kernels.walked. As long as nothing is committed the rows that are moved count for
        nothing. The length stays what it was: how long the path is, the host does not know.
        """
        state = copy(this.state)
        graph = self.of((this.tree.rows, None, state.capacity, False), _moved_in_place)
        state.conv, state.recurrent, _, _, done = graph(
            {
                "numbers": came,
                "keys": state.keys,
                "values": state.values,
                "order": state.written.order,
                "tree": this.layout.on_device["paths"],
                "conv": state.conv,
                "recurrent": state.recurrent,
                "tapes": [tape.rows for tape in this.tapes],
            }
        )
        for last in done:
            state.written.by(last)
        return state


def _replayed(given: dict[str, Any]) -> tuple[list[Array], ...]:
    """Convolution rows, recurrent states; keys and values that are new arrays; what was written in
    place last, if anything was."""
    conv, recurrent = given["conv"], given["recurrent"]
    if given["tapes"]:
        tapes = [Tape(tuple(rows), None) for rows in given["tapes"]]
        conv, recurrent = replay(conv, recurrent, tapes, given["numbers"][: MAX_ROWS + 1])
    return conv, recurrent, [], [], []


def _moved(given: dict[str, Any]) -> tuple[list[Array], ...]:
    conv, recurrent, *_ = _replayed(given)
    places, first = given["numbers"][MAX_ROWS + 1 : -1], given["numbers"][-1:]
    keys, values = (
        [
            mx.slice_update(one, mx.take(new, places, axis=1), first, axes=(1,))
            for one, new in zip(buffers, staged, strict=True)
        ]
        for buffers, staged in zip((given["keys"], given["values"]), given["staged"], strict=True)
    )
    return conv, recurrent, keys, values, []


def _moved_in_place(given: dict[str, Any]) -> tuple[list[Array], ...]:
    conv, recurrent, *_ = _replayed(given)
    if not given["keys"]:
        return conv, recurrent, [], [], []
    buffers = given["keys"], given["values"]
    done = kept_rows(*buffers, given["numbers"], given["tree"], given["order"])
    return conv, recurrent, [], [], [done]
