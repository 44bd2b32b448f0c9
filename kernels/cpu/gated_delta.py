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
        _replay(conv, by_key, tape.rows[0], rows, new_conv, new_state)
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
    rows, channels = len(parents), conv.shape[1]
    heads, key_dim, value_dim = state.shape
    keys = key_heads * key_dim
    taps = weight.shape[0]
    queries = np.empty((rows, keys), np.float32)
    values = np.empty((rows, heads * value_dim), np.float32)
    betas = np.empty((rows, heads), np.float32)
    mixed = np.empty(channels, np.float32)
    parent_of_any = np.zeros(rows, np.bool_)
    chain = True
    for row in range(rows):
        if parents[row] >= 0:
            parent_of_any[parents[row]] = True
        chain = chain and parents[row] == row - 1
        # Convolution from the row upwards, then through the committed rows before the root.
        for i in range(channels):
            mixed[i] = 0
        above = np.int64(row)
        for tap in range(taps - 1, -1, -1):
            if above >= 0:
                source = qkv[above, qkv_start : qkv_start + channels]
                above = np.int64(parents[above])
            else:
                source = conv[taps - 1 + above]
                above -= 1
            add_products(source, weight[tap], mixed)
        # Through slices: of sums of indexes the compiler would not know that they are not negative.
        for i in range(channels):
            mixed[i] = silu(mixed[i])
        tape[row, :channels] = qkv[row, qkv_start : qkv_start + channels]
        for head in range(key_heads):
            at = head * key_dim
            _unit(mixed[at : at + key_dim], 1 / math.sqrt(key_dim), queries[row, at : at + key_dim])
            key = tape[row, channels + at : channels + at + key_dim]
            _unit(mixed[keys + at : keys + at + key_dim], 1.0, key)
        values[row] = mixed[2 * keys :]
        for head in range(heads):
            x = a[row, a_start + head] + dt_bias[head]
            # log(1 + exp(x)), without overflow
            softplus = max(x, np.float32(0)) + math.log1p(math.exp(-abs(x)))
            decay = math.exp(-math.exp(a_log[head]) * softplus)
            tape[row, channels + keys + heads * value_dim + head] = decay
            betas[row, head] = 1 / (1 + math.exp(-b[row, b_start + head]))

    states = np.empty((2 if chain else rows, key_dim, value_dim), np.float32)
    by_key, by_query = np.empty(value_dim, np.float32), np.empty(value_dim, np.float32)
    for head in range(heads):
        at = head // (heads // key_heads) * key_dim
        first = head * value_dim
        for row in range(rows):
            key, query = (
                tape[row, channels + at : channels + at + key_dim],
                queries[row, at : at + key_dim],
            )
            delta = tape[row, channels + keys + first : channels + keys + first + value_dim]
            decay = tape[row, channels + keys + heads * value_dim + head]
            beta, value = betas[row, head], values[row, first : first + value_dim]
            parent = np.int64(parents[row])
            source = state[head] if parent < 0 else states[parent & 1 if chain else parent]
            read(source, key, query, by_key, by_query)
            product = np.float32(0)
            for i in range(key_dim):
                product += key[i] * query[i]
            y = out[row, first : first + value_dim]
            for v in range(value_dim):
                delta[v] = fma(-decay, by_key[v], value[v]) * beta
                y[v] = fma(product, delta[v], decay * by_query[v])
            final = len(last) > 0 and row == rows - 1
            if parent_of_any[row] or final:
                update(
                    source,
                    decay,
                    key,
                    delta,
                    last[head] if final else states[row & 1 if chain else row],
                )
            normalize(y, norm, eps, by_query)
            gate = z[row, z_start + first : z_start + first + value_dim]
            for v in range(value_dim):
                y[v] = by_query[v] * silu(gate[v])


@jit
def _unit(x, scale, out):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * x[i]
    factor = np.float32(scale / math.sqrt(total + 1e-6))
    for i in range(len(x)):
        out[i] = x[i] * factor


@jit
def _replay(conv, state, tape, path, new_conv, new_state):  # type: ignore[no-untyped-def]
    before, channels = conv.shape
    heads, key_dim, value_dim = state.shape
    decays = tape.shape[1] - heads
    deltas = decays - heads * value_dim
    repeats = heads // ((deltas - channels) // key_dim)
    for i in range(before):
        at = len(path) + i - before  # in the path, or from the end of the rows before it
        if at >= 0:
            new_conv[i] = tape[path[at], :channels]
        else:
            new_conv[i] = conv[before + at]
    for head in range(heads):
        at = channels + head // repeats * key_dim
        first = deltas + head * value_dim
        for step in range(len(path)):
            row = tape[path[step]]
            source = state[head] if step == 0 else new_state[head]
            key, delta = row[at : at + key_dim], row[first : first + value_dim]
            update(source, row[decays + head], key, delta, new_state[head])
