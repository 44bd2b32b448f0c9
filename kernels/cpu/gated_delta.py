"""The gated delta rule on NumPy arrays: convolution and recurrence along the rows' own paths.

A prompt is a tree without branches, and committing a path runs it once more as such a prompt: one
compiled recurrence serves all three, which is why their states agree to the bit.
"""

import math

import numpy as np

from specdec.kernels.cpu.jit import jit


def convolve(
    x: np.ndarray, state: np.ndarray, windows: np.ndarray, weight: np.ndarray
) -> np.ndarray:
    """Depthwise causal convolution along each row's path, then SiLU, as kernels.gated_delta."""
    out = np.empty_like(x)
    _convolve(np.concatenate([state, x]), windows, weight, out)
    return out


def normalize_keys(queries: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L2-normalize queries and keys [rows, key_heads, key_dim], scale the queries."""
    queries, keys = np.ascontiguousarray(queries), np.ascontiguousarray(keys)
    out = np.empty_like(queries), np.empty_like(keys)
    _normalize(queries, keys, *out)
    return out


def gates(
    a: np.ndarray, b: np.ndarray, a_log: np.ndarray, dt_bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """log g = -exp(A_log) softplus(a + dt_bias), and beta = sigmoid(b)."""
    log_decay, beta = np.empty(a.shape, np.float32), np.empty(b.shape, np.float32)
    _gates(np.ascontiguousarray(a), np.ascontiguousarray(b), a_log, dt_bias, log_decay, beta)
    return log_decay, beta


def recur(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    log_decay: np.ndarray,
    beta: np.ndarray,
    state: np.ndarray,
    parents: np.ndarray,
    rows: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence along every row's path from `state`, which is left as it is.

    queries, keys [n, key_heads, key_dim]; values [n, heads, value_dim]; log_decay, beta
    [n, heads]; state [heads, value_dim, key_dim]; parents int32 [rows], -1 for the root; rows int64
    [rows]: which of the n these are, None for all.
    Returns y [rows, heads, value_dim] and the state after the last row.
    """
    rows = np.arange(len(parents)) if rows is None else rows
    out = np.empty((len(rows), *values.shape[1:]), np.float32)
    # In memory a state lies by key features: sums over them then run over whole vectors. States
    # made here keep that layout, behind the usual shape.
    state = np.ascontiguousarray(state.swapaxes(1, 2))
    last = np.empty_like(state)
    values = np.ascontiguousarray(values)
    _recur(queries, keys, values, log_decay, beta, state, rows, parents, out, last)
    return out, last.swapaxes(1, 2)


@jit
def _convolve(seen, windows, weight, out):  # type: ignore[no-untyped-def]
    for row in range(out.shape[0]):
        for channel in range(out.shape[1]):
            out[row, channel] = 0
        for tap in range(windows.shape[1]):
            source = seen[windows[row, tap]]
            for channel in range(out.shape[1]):
                out[row, channel] += source[channel] * weight[tap, channel]
        for channel in range(out.shape[1]):
            total = out[row, channel]
            out[row, channel] = total / (np.float32(1) + math.exp(-total))


@jit
def _normalize(queries, keys, out_queries, out_keys):  # type: ignore[no-untyped-def]
    rows, heads, dim = queries.shape
    for row in range(rows):
        for head in range(heads):
            query_total = np.float32(0)
            key_total = np.float32(0)
            for i in range(dim):
                query_total += queries[row, head, i] * queries[row, head, i]
                key_total += keys[row, head, i] * keys[row, head, i]
            query_scale = np.float32(1 / (math.sqrt(query_total + 1e-6) * math.sqrt(dim)))
            key_scale = np.float32(1 / math.sqrt(key_total + 1e-6))
            for i in range(dim):
                out_queries[row, head, i] = queries[row, head, i] * query_scale
                out_keys[row, head, i] = keys[row, head, i] * key_scale


@jit
def _gates(a, b, a_log, dt_bias, log_decay, beta):  # type: ignore[no-untyped-def]
    for row in range(a.shape[0]):
        for head in range(a.shape[1]):
            x = a[row, head] + dt_bias[head]
            # log(1 + exp(x)), without overflow
            softplus = max(x, np.float32(0)) + math.log1p(math.exp(-abs(x)))
            log_decay[row, head] = -math.exp(a_log[head]) * softplus
            beta[row, head] = 1 / (1 + math.exp(-b[row, head]))


@jit
def _recur(queries, keys, values, log_decay, beta, state, inputs, parents, out, last):  # type: ignore[no-untyped-def]
    rows, heads, value_dim = out.shape
    key_dim = keys.shape[2]
    repeats = heads // keys.shape[1]
    # A parent's state is needed as long as it has children to come: all are kept in a tree, while
    # a chain of any length needs room for two.
    chain = True
    for row in range(rows):
        chain = chain and parents[row] == row - 1
    states = np.empty((2 if chain else rows, key_dim, value_dim), np.float32)
    delta = np.empty(value_dim, np.float32)
    y = np.empty(value_dim, np.float32)
    for head in range(heads):
        key_head = head // repeats
        for row in range(rows):
            parent, at = parents[row], inputs[row]
            target = states[row & 1 if chain else row]
            source = state[head] if parent < 0 else states[parent & 1 if chain else parent]
            fade = math.exp(log_decay[at, head])
            for v in range(value_dim):
                delta[v] = 0
                y[v] = 0
            for k in range(key_dim):
                key = keys[at, key_head, k]
                for v in range(value_dim):
                    target[k, v] = source[k, v] * fade
                    delta[v] += target[k, v] * key
            for v in range(value_dim):
                delta[v] = (values[at, head, v] - delta[v]) * beta[at, head]
            for k in range(key_dim):
                key = keys[at, key_head, k]
                query = queries[at, key_head, k]
                for v in range(value_dim):
                    target[k, v] += delta[v] * key
                    y[v] += target[k, v] * query
            for v in range(value_dim):
                out[row, head, v] = y[v]
        last[head] = states[(rows - 1) & 1 if chain else rows - 1]
