"""CommitGraph: making a path part of the state, compiled by MLX, for verify passes that are graphs.

Passes over as many rows are one graph, whatever their trees and paths: which rows are moved to
directly behind the committed ones goes in as an array, and so does the path that is replayed.
"""

from typing import Any

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array, start
from specdec.kernels.gated_delta import Tape, replay
from specdec.kernels.gpu.gated_delta import padded
from specdec.kernels.gpu.graphs import Graphs
from specdec.kernels.gpu.limits import MAX_ROWS, refused
from specdec.target.passes import TreePass


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
        # rows behind the path stay where they are
        places = state.length + np.array([*path, *range(len(path), rows)])
        numbers = np.concatenate([padded(path), places]).astype(np.int32)
        capacity = state.keys[0].shape[1] if state.keys else 0
        graph = self.of((rows, moves, capacity), _moved if moves else _replayed)
        found = graph(
            {
                "numbers": mx.array(numbers),
                "keys": state.keys if moves else [],
                "values": state.values if moves else [],
                "conv": state.conv,
                "recurrent": state.recurrent,
                "tapes": [tape.rows for tape in this.tapes],
            }
        )
        conv, recurrent, keys, values = found
        start(*keys, *values, *conv, *recurrent)
        if moves:
            state.keys[:], state.values[:] = keys, values
        state.advance(len(path), conv, recurrent)


def _replayed(given: dict[str, Any]) -> tuple[list[Array], ...]:
    """Convolution rows, recurrent states, keys and values."""
    conv, recurrent = given["conv"], given["recurrent"]
    if given["tapes"]:
        tapes = [Tape(tuple(rows), None) for rows in given["tapes"]]
        conv, recurrent = replay(conv, recurrent, tapes, given["numbers"][: MAX_ROWS + 1])
    return conv, recurrent, given["keys"], given["values"]


def _moved(given: dict[str, Any]) -> tuple[list[Array], ...]:
    conv, recurrent, keys, values = _replayed(given)
    places = given["numbers"][MAX_ROWS + 1 :]
    first = places[:1]  # the root stays where it is
    keys, values = (
        [mx.slice_update(one, mx.take(one, places, axis=1), first, axes=(1,)) for one in buffers]
        for buffers in (keys, values)
    )
    return conv, recurrent, keys, values
