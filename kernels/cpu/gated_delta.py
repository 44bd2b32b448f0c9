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


@np.errstate(over="ignore", invalid="ignore")  # saturates; the logits' check sees NaN
def gates(
    a: np.ndarray, b: np.ndarray, a_log: np.ndarray, dt_bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """log g = -exp(A_log) softplus(a + dt_bias), and beta = sigmoid(b)."""
    one = np.float32(1)
    log_decay = -np.exp(a_log) * np.logaddexp(a + dt_bias, np.float32(0))
    return log_decay, one / (one + np.exp(-b))


def recur(
    queries: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    log_decay: np.ndarray,
    beta: np.ndarray,
    state: np.ndarray,
    parents: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence along every row's path from `state`, which is left as it is.

    queries, keys [rows, key_heads, key_dim]; values [rows, heads, value_dim]; log_decay, beta
    [rows, heads]; state [heads, value_dim, key_dim]; parents int32 [rows], -1 for the root.
    Returns y [rows, heads, value_dim] and the state after the last row.
    """
    out = np.empty(values.shape, np.float32)
    last = np.empty_like(state)
    # A chain needs room for two states, and not for one: updated in place, the compiled loop would
    # take its path for overlapping memory, which adds in another order.
    chain = bool((parents == np.arange(-1, len(parents) - 1)).all())
    scratch = np.empty((2 if chain else len(parents), *state.shape[1:]), np.float32)
    values, decay, beta = (
        np.ascontiguousarray(values),
        np.exp(log_decay),
        np.ascontiguousarray(beta),
    )
    _recur(queries, keys, values, decay, beta, state, parents, chain, scratch, out, last)
    return out, last


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
def _recur(queries, keys, values, decay, beta, state, parents, chain, scratch, out, last):  # type: ignore[no-untyped-def]
    rows, heads, value_dim = values.shape
    key_dim = keys.shape[2]
    repeats = heads // keys.shape[1]
    for head in range(heads):
        key_head = head // repeats
        for row in range(rows):
            parent = parents[row]
            place = row & 1 if chain else row
            above = parent & 1 if chain else parent
            fade, write = decay[row, head], beta[row, head]
            for v in range(value_dim):
                source = state[head, v] if parent < 0 else scratch[above, v]
                target = scratch[place, v]
                read = np.float32(0)
                for k in range(key_dim):
                    target[k] = source[k] * fade
                    read += target[k] * keys[row, key_head, k]
                delta = (values[row, head, v] - read) * write
                y = np.float32(0)
                for k in range(key_dim):
                    target[k] += delta * keys[row, key_head, k]
                    y += target[k] * queries[row, key_head, k]
                out[row, head, v] = y
        last[head] = scratch[(rows - 1) & 1 if chain else rows - 1]
