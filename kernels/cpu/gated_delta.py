"""The mixer of a gated delta layer on NumPy arrays: one compiled call per layer.

Along every row's path: convolution, then per head

    r = S k;   delta = beta (v - g r);   y = g S q + (k . q) delta;   S <- g S + delta k^T

where only rows with children update a state. The tape holds what the updates of any path are made
of; replaying runs the same update, so that a committed state has the bits of decoding token by
token. A prompt is a tree without branches.
"""

import math

import numpy as np

from specdec.kernels.cpu.exp import fma, silu
from specdec.kernels.cpu.jit import jit
from specdec.kernels.cpu.norm import normalize
from specdec.kernels.cpu.team import TEAM, share, take
from specdec.kernels.cpu.vectors import add_products, read, update
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
    share(team, key_heads, _mix_heads, (*inputs, *weights, parents, places, kept, tape, out, last))


@jit
def _mix_heads(  # type: ignore[no-untyped-def]
    left,
    key_head,
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
    places,
    kept,
    tape,
    out,
    last,
):
    """All rows of key heads and of their value heads, one key head a part."""
    rows, channels = len(parents), conv.shape[1]
    heads, key_dim, value_dim = state.shape
    keys, group = key_heads * key_dim, heads // key_heads
    deltas = channels + keys
    width = group * value_dim
    queries = np.empty((rows, key_dim), np.float32)
    values = np.empty((rows, width), np.float32)
    betas = np.empty((rows, group), np.float32)
    mixed = np.empty(key_dim, np.float32)
    states = np.empty((kept, key_dim, value_dim), np.float32)
    by_key, by_query = np.empty(value_dim, np.float32), np.empty(value_dim, np.float32)
    done = 0
    while key_head >= 0:
        at = key_head * key_dim
        first_value = key_head * width
        for row in range(rows):
            source = weight, conv, qkv, qkv_start, parents, row, tape
            _convolve(*source, at, mixed)
            _unit(mixed, 1 / math.sqrt(key_dim), queries[row])
            _convolve(*source, keys + at, mixed)
            _unit(mixed, 1.0, tape[row, channels + at : channels + at + key_dim])
            _convolve(*source, 2 * keys + first_value, values[row])
            for h in range(group):
                head = key_head * group + h
                x = a[row, a_start + head] + dt_bias[head]
                # log(1 + exp(x)), without overflow
                softplus = max(x, np.float32(0)) + math.log1p(math.exp(-abs(x)))
                decay = math.exp(-math.exp(a_log[head]) * softplus)
                tape[row, deltas + heads * value_dim + head] = decay
                betas[row, h] = 1 / (1 + math.exp(-b[row, b_start + head]))

        for h in range(group):
            head = key_head * group + h
            first = head * value_dim
            for row in range(rows):
                key, query = tape[row, channels + at : channels + at + key_dim], queries[row]
                delta = tape[row, deltas + first : deltas + first + value_dim]
                decay = tape[row, deltas + heads * value_dim + head]
                beta, value = betas[row, h], values[row, h * value_dim : (h + 1) * value_dim]
                parent = np.int64(parents[row])
                source = state[head] if parent < 0 else states[places[parent]]
                read(source, key, query, by_key, by_query)
                product = np.float32(0)
                for i in range(key_dim):
                    product += key[i] * query[i]
                y = out[row, first : first + value_dim]
                for v in range(value_dim):
                    delta[v] = fma(-decay, by_key[v], value[v]) * beta
                    y[v] = fma(product, delta[v], decay * by_query[v])
                final = len(last) > 0 and row == rows - 1
                if places[row] >= 0 or final:
                    target = last[head] if final else states[places[row]]
                    update(source, decay, key, delta, target)
                normalize(y, norm, eps, by_query)
                gate = z[row, z_start + first : z_start + first + value_dim]
                for v in range(value_dim):
                    y[v] = by_query[v] * silu(gate[v])
        key_head = take(left)
        done += 1
    return done


@jit
def _convolve(weight, conv, qkv, start, parents, row, tape, first, mixed):  # type: ignore[no-untyped-def]
    """The channels from `first` on of one row: mixed, and on the tape as they came.

    From the row upwards, then through the committed rows before the root.
    """
    taps, width = weight.shape[0], len(mixed)
    for i in range(width):
        mixed[i] = 0
    above = np.int64(row)
    for tap in range(taps - 1, -1, -1):
        # Slices: of sums of indexes the compiler would not know that they are not negative.
        if above >= 0:
            source = qkv[above, start + first : start + first + width]
            above = np.int64(parents[above])
        else:
            source = conv[taps - 1 + above, first : first + width]
            above -= 1
        add_products(source, weight[tap, first : first + width], mixed)
    for i in range(width):
        mixed[i] = silu(mixed[i])
    tape[row, first : first + width] = qkv[row, start + first : start + first + width]


@jit
def _unit(x, scale, out):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    factor = np.float32(scale / math.sqrt(total + 1e-6))
    for i in range(len(x)):
        out[i] = x[i] * factor


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
