"""The mixer of a gated delta layer, from its input projections to its output projection.

Causal convolution and SiLU, L2-normalized queries and keys, the gated delta rule (delta_rule.py),
and an output norm with a gate; for a prompt and for a tree, of which `replay` commits one path.
"""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array, concatenate, contiguous, is_numpy
from specdec.kernels.delta_rule import (
    Updates,
    convolve,
    convolve_prompt,
    gates,
    normalize_keys,
    recur_prompt,
    recur_tree,
    replay_updates,
)
from specdec.kernels.executor import operation
from specdec.kernels.layout import TreeLayout
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm, gated_rms_norm


@dataclass(frozen=True, eq=False)
class DeltaWeights:
    """Everything of a layer but its projections.

    conv [taps, channels], channels of the queries, keys and values; a_log, dt_bias float32
    [heads]; norm over value_dim. heads counts the value heads, consecutive ones share a key head.
    """

    conv: Array
    a_log: Array
    dt_bias: Array
    norm: Norm
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int


class DeltaInputs(NamedTuple):
    """The projections: qkv [rows, channels], z [rows, heads * value_dim], b and a [rows, heads]."""

    qkv: Piece
    z: Piece
    b: Piece
    a: Piece


@dataclass(frozen=True, eq=False)
class Tape:
    """What replaying a path of one layer's verify pass needs; its arrays are the executor's own.

    last: convolution rows and state after the last row, where that can be had without replaying.
    """

    rows: tuple[Array, ...]
    last: tuple[Array, Array] | None

    @property
    def arrays(self) -> tuple[Array, ...]:
        return (*self.rows, *(self.last or ()))


@operation()
def mix_tree(
    inputs: DeltaInputs, weights: DeltaWeights, conv: Array, state: Array, tree: TreeLayout
) -> tuple[Array, Tape]:
    """The mixer along every row's path: y [rows, heads * value_dim], and the tape.

    conv [taps - 1, channels], the rows before the root; state float32 [heads, value_dim, key_dim];
    both are left as they are.
    """
    x = inputs.qkv.values
    windows = tree.windows(weights.conv.shape[0])
    mixed = convolve(x, conv, windows, weights.conv)
    y, updates = recur_tree(*_recurrence(mixed, inputs, weights), state, tree)
    last = None
    if updates.last is not None:
        last = concatenate([conv, x])[tree.rows :], updates.last
    return _output(y, inputs, weights), Tape((x, *updates.rows), last)


@operation("never")
def mix_prompt(
    inputs: DeltaInputs, weights: DeltaWeights, conv: Array, state: Array
) -> tuple[Array, Array, Array]:
    """The mixer over consecutive rows: y, and the convolution rows and state after the last."""
    x = inputs.qkv.values
    mixed = convolve_prompt(x, conv, weights.conv)
    y, state = recur_prompt(*_recurrence(mixed, inputs, weights), state)
    # Only these rows: a slice would keep the chunk's array until the commit.
    conv = contiguous(concatenate([conv, x])[x.shape[0] :])
    return _output(y, inputs, weights), conv, state


@operation()
def replay(
    convs: list[Array], states: list[Array], tapes: list[Tape], path: list[int]
) -> tuple[list[Array], list[Array]]:
    """Every layer's convolution rows and state after the accepted path; one tape per layer. A
    kernel takes the path also as an array of its own (kernels.gpu.gated_delta)."""
    if all(tape.last is not None and len(path) == tape.rows[0].shape[0] for tape in tapes):
        after = [tape.last for tape in tapes if tape.last is not None]
        return [conv for conv, _ in after], [state for _, state in after]
    rows = np.array(path) if is_numpy(convs[0]) else mx.array(path)
    convs = [
        concatenate([conv, tape.rows[0][rows]])[len(path) :]
        for conv, tape in zip(convs, tapes, strict=True)
    ]
    updates = [Updates(tape.rows[1:], None) for tape in tapes]
    return convs, replay_updates(states, updates, path)


def _recurrence(
    mixed: Array, inputs: DeltaInputs, weights: DeltaWeights
) -> tuple[Array, Array, Array, Array, Array]:
    """queries, keys, values, log decay and beta of the delta rule."""
    rows, keys = mixed.shape[0], weights.key_heads * weights.key_dim
    queries, keys = normalize_keys(
        mixed[:, :keys].reshape(rows, weights.key_heads, weights.key_dim),
        mixed[:, keys : 2 * keys].reshape(rows, weights.key_heads, weights.key_dim),
    )
    values = mixed[:, mixed.shape[1] - weights.heads * weights.value_dim :]
    decay, beta = gates(inputs.a.values, inputs.b.values, weights.a_log, weights.dt_bias)
    return queries, keys, values.reshape(rows, weights.heads, weights.value_dim), decay, beta


def _output(y: Array, inputs: DeltaInputs, weights: DeltaWeights) -> Array:
    """The output norm and gate: y [rows, heads, value_dim] -> [rows, heads * value_dim]."""
    z = inputs.z.values
    y = y.astype(z.dtype)
    y = gated_rms_norm(y, z.reshape(y.shape), weights.norm.weight, weights.norm.eps)
    return y.reshape(z.shape)
