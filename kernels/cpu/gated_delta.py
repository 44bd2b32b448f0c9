"""The mixer of a gated delta layer on NumPy arrays: one compiled call per layer.

Along every row's path: convolution, then per head

    r = S k;   delta = beta (v - g r);   y = g S q + (k . q) delta;   S <- g S + delta k^T

where only rows with children update a state. The tape holds what the updates of any path are made
of; replaying runs the same update, so that a committed state has the bits of decoding token by
token. A prompt is a tree without branches.
"""

import numpy as np

from specdec.kernels.cpu.delta_heads import mix_heads
from specdec.kernels.cpu.jit import jit
from specdec.kernels.cpu.team import TEAM, share, take
from specdec.kernels.cpu.vectors import update
from specdec.kernels.gated_delta import DeltaInputs, DeltaWeights, Tape
from specdec.kernels.layout import TreeLayout

_NO_STATE = np.zeros((0, 0, 0), np.float32)


def mix_tree(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    conv: np.ndarray,
    state: np.ndarray,
    tree: TreeLayout,
) -> tuple[np.ndarray, Tape]:
    """The mixer along every row's path, as kernels.gated_delta."""
    y, tape = _mix(inputs, weights, conv, state, tree.parents, _NO_STATE)
    return y, Tape((tape,), None)


def mix_prompt(
    inputs: DeltaInputs, weights: DeltaWeights, conv: np.ndarray, state: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mixer over consecutive rows: y, and the convolution rows and state after the last."""
    rows, before = len(inputs.qkv.rows), conv.shape[0]
    last = np.empty(state.swapaxes(1, 2).shape, np.float32)
    parents = TreeLayout.chain(rows).parents
    y, _ = _mix(inputs, weights, conv, state, parents, last)
    conv = np.concatenate([conv, inputs.qkv.values[-before:]])[-before:].copy()
    return y, conv, last.swapaxes(1, 2)


def replay(
    convs: list[np.ndarray], states: list[np.ndarray], tapes: list[Tape], path: list[int]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Every layer's convolution rows and state after the accepted path; one tape per layer."""
    rows = np.array(path)
    new_convs, new_states = [], []
    for conv, state, tape in zip(convs, states, tapes, strict=True):
        by_key = _by_key(state)
        new_conv, new_state = np.empty_like(conv), np.empty_like(by_key)
        _replay(TEAM.place, conv, by_key, tape.rows[0], rows, new_conv, new_state)
        new_convs.append(new_conv)
        new_states.append(new_state.swapaxes(1, 2))
    return new_convs, new_states


def _mix(
    inputs: DeltaInputs,
    weights: DeltaWeights,
    conv: np.ndarray,
    state: np.ndarray,
    parents: np.ndarray,
    last: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """y [rows, heads * value_dim] and the tape's rows; fills `last` where it has a size.

    A row of the tape: its projection (channels), keys, deltas [heads, value_dim], decays [heads].
    """
    rows, channels = len(parents), conv.shape[1]
    keys, values = weights.key_heads * weights.key_dim, weights.heads * weights.value_dim
    out = np.empty((rows, values), np.float32)
    tape = np.empty((rows, channels + keys + values + weights.heads), np.float32)
    _mix_rows(
        TEAM.place,
        *(piece.rows for piece in inputs),
        *(piece.start for piece in inputs),
        weights.conv,
        weights.a_log,
        weights.dt_bias,
        weights.norm.weight,
        weights.norm.eps,
        weights.key_heads,
        conv,
        _by_key(state),
        parents,
        tape,
        out,
        last,
    )
    return out, tape


def _by_key(state: np.ndarray) -> np.ndarray:
    """A state as it lies in memory, [heads, key_dim, value_dim]; those made here do."""
    return np.ascontiguousarray(state.swapaxes(1, 2))


@jit
def _mix_rows(  # type: ignore[no-untyped-def]
    team,
    qkv,
    z,
    b,
    a,
    qkv_start,
    z_start,
    b_start,
    a_start,
    weight,
    a_log,
    dt_bias,
    norm,
    eps,
    key_heads,
    conv,
    state,
    parents,
    tape,
    out,
    last,
):
    # Where the states of rows with children are kept; a chain needs but the last two.
    rows = len(parents)
    places = np.full(rows, -1, np.int64)
    chain = True
    for row in range(rows):
        if parents[row] >= 0:
            places[parents[row]] = 0
        chain = chain and parents[row] == row - 1
    kept = 0
    for row in range(rows):
        if places[row] == 0:
            places[row] = kept & 1 if chain else kept
            kept += 1
    kept = min(kept, 2) if chain else kept
    inputs = qkv, z, b, a, qkv_start, z_start, b_start, a_start
    weights = weight, a_log, dt_bias, norm, eps, key_heads, conv, state
    share(team, key_heads, mix_heads, (*inputs, *weights, parents, places, kept, tape, out, last))


@jit
def _replay(team, conv, state, tape, path, new_conv, new_state):  # type: ignore[no-untyped-def]
    before, channels = conv.shape
    for i in range(before):
        at = len(path) + i - before  # in the path, or from the end of the rows before it
        if at >= 0:
            new_conv[i] = tape[path[at], :channels]
        else:
            new_conv[i] = conv[before + at]
    share(team, state.shape[0], _replay_heads, (channels, state, tape, path, new_state))


@jit
def _replay_heads(left, head, channels, state, tape, path, new_state):  # type: ignore[no-untyped-def]
    heads, key_dim, value_dim = state.shape
    decays = tape.shape[1] - heads
    deltas = decays - heads * value_dim
    repeats = heads // ((deltas - channels) // key_dim)
    done = 0
    while head >= 0:
        at = channels + head // repeats * key_dim
        first = deltas + head * value_dim
        for step in range(len(path)):
            row = tape[path[step]]
            source = state[head] if step == 0 else new_state[head]
            key, delta = row[at : at + key_dim], row[first : first + value_dim]
            update(source, row[decays + head], key, delta, new_state[head])
        head = take(left)
        done += 1
    return done
