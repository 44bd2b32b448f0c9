"""The gated delta rule: causal convolution and recurrence, over a prompt and over a tree.

Per head, with state S [value_dim, key_dim] in float32 (Yang et al., Gated Delta Networks, 2024):

    S <- g S;   delta = beta (v - S k);   S <- S + delta k^T;   y = S q

A tree's rows each follow their own path from the committed state. `recur_tree` never writes the
state: it returns delta as a tape, and `replay` repeats the accepted path's updates with the very
same operations, so that the committed state has the bits of decoding token by token.
"""

from dataclasses import dataclass

import mlx.core as mx

from specdec.kernels.layout import TreeLayout
from specdec.kernels.norm import rms_norm, silu

CHUNK = 16  # tokens the prompt's recurrence handles as one triangular system


@dataclass(frozen=True, eq=False)
class Tape:
    """What replaying a verify pass needs of one layer.

    delta float32 [rows, value_heads, value_dim]; keys float32 [rows, value_heads, key_dim];
    decay float32 [rows, value_heads].
    """

    delta: mx.array
    keys: mx.array
    decay: mx.array


def convolve(x: mx.array, state: mx.array, windows: mx.array, weight: mx.array) -> mx.array:
    """Depthwise causal convolution along each row's path, then SiLU.

    x [rows, channels]; state [taps - 1, channels], the committed rows before the root; windows
    int32 [rows, taps] from TreeLayout.windows; weight [taps, channels]. Returns [rows, channels].
    """
    seen = mx.concatenate([state, x], axis=0)[windows]  # [rows, taps, channels]
    return silu((seen * weight).sum(axis=1))


def convolve_prompt(x: mx.array, state: mx.array, weight: mx.array) -> mx.array:
    """`convolve` for consecutive rows: x [rows, channels] directly after the state."""
    taps, rows = weight.shape[0], x.shape[0]
    seen = mx.concatenate([state, x], axis=0)
    total = seen[:rows] * weight[0]
    for tap in range(1, taps):
        total = total + seen[tap : tap + rows] * weight[tap]
    return silu(total)


def normalize_keys(
    queries: mx.array, keys: mx.array, value_heads: int
) -> tuple[mx.array, mx.array]:
    """L2-normalize queries and keys, scale the queries, repeat both for the value heads.

    queries, keys [rows, key_heads, key_dim] -> float32 [rows, value_heads, key_dim].
    """
    dim = queries.shape[-1]
    # rms_norm divides by sqrt(mean(x^2) + eps): with eps / dim this is x * sqrt(dim) / |x|.
    eps = 1e-6 / dim
    queries = rms_norm(queries.astype(mx.float32), None, eps) * (1.0 / dim)
    keys = rms_norm(keys.astype(mx.float32), None, eps) * dim**-0.5
    repeats = value_heads // queries.shape[1]
    return mx.repeat(queries, repeats, axis=1), mx.repeat(keys, repeats, axis=1)


def log_decay(a: mx.array, a_log: mx.array, dt_bias: mx.array) -> mx.array:
    """log g = -exp(A_log) softplus(a + dt_bias), float32 [rows, value_heads]."""
    step = mx.logaddexp(a.astype(mx.float32) + dt_bias.astype(mx.float32), 0.0)
    return -mx.exp(a_log.astype(mx.float32)) * step


def _step(
    state: mx.array, decay: mx.array, keys: mx.array, values: mx.array, beta: mx.array
) -> tuple[mx.array, mx.array]:
    """One update of states [n, heads, value_dim, key_dim]: the new states and delta."""
    state = state * decay[..., None, None]
    read = (state * keys[..., None, :]).sum(axis=-1)
    delta = (values - read) * beta[..., None]
    return state + delta[..., None] * keys[..., None, :], delta


def recur_tree(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    decay: mx.array,
    beta: mx.array,
    state: mx.array,
    tree: TreeLayout,
) -> tuple[mx.array, mx.array]:
    """The recurrence along every row's path: outputs and delta, both in row order.

    queries, keys float32 [rows, heads, key_dim]; values float32 [rows, heads, value_dim]; decay g,
    beta float32 [rows, heads]; state float32 [heads, value_dim, key_dim], left as it is.
    Returns y and delta, float32 [rows, heads, value_dim].
    """
    states = state[None]
    outputs, deltas = [], []
    for level in tree.levels:
        if level.parents is not None:
            states = states[mx.array(level.parents)]
        rows = mx.array(level.rows) if tree.rows > 1 else slice(None)
        states, delta = _step(states, decay[rows], keys[rows], values[rows], beta[rows])
        outputs.append((states * queries[rows][..., None, :]).sum(axis=-1))
        deltas.append(delta)
    y, delta = mx.concatenate(outputs), mx.concatenate(deltas)
    if tree.level_order is not None:
        y, delta = y[tree.level_order], delta[tree.level_order]
    return y, delta


def replay(state: mx.array, tapes: list[Tape], path: list[int]) -> mx.array:
    """Advance all layers' states along the accepted path.

    state float32 [layers, heads, value_dim, key_dim], one tape per layer. Returns the new state.
    """
    delta = mx.stack([tape.delta for tape in tapes])  # [layers, rows, heads, value_dim]
    keys = mx.stack([tape.keys for tape in tapes])
    decay = mx.stack([tape.decay for tape in tapes])
    for row in path:
        state = state * decay[:, row, :, None, None]
        state = state + delta[:, row, :, :, None] * keys[:, row, :, None, :]
    return state


def recur_prompt(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    log_decay: mx.array,
    beta: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    """The recurrence over consecutive rows in chunks (the WY form of the delta rule).

    Shapes and dtypes as recur_tree, the decay as its logarithm. Returns outputs float32
    [rows, heads, value_dim] and the state after the last row.
    """
    rows = queries.shape[0]
    padding = -rows % CHUNK
    # A padded row has beta = 0 and log g = 0: it changes nothing.
    queries, keys, values, log_decay, beta = (
        mx.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        .reshape(-1, CHUNK, *x.shape[1:])
        .swapaxes(1, 2)  # [chunks, heads, CHUNK, ...]
        for x in (queries, keys, values, log_decay, beta)
    )
    cumulative = mx.cumsum(log_decay, axis=-1)  # [chunks, heads, CHUNK]
    lower = mx.tril(mx.ones((CHUNK, CHUNK)))
    # g_i ... g_{j+1} for i >= j; masked before exp, for above the diagonal it would overflow
    between = mx.exp((cumulative[..., :, None] - cumulative[..., None, :]) * lower) * lower
    weighted = keys * beta[..., None]
    strict = -(weighted @ keys.swapaxes(-1, -2)) * between * mx.tril(lower, -1)
    inverse = _unit_lower_inverse(strict)
    from_values = inverse @ (values * beta[..., None])  # [chunks, heads, CHUNK, value_dim]
    from_state = inverse @ (weighted * mx.exp(cumulative)[..., None])  # [..., CHUNK, key_dim]
    scores = (queries @ keys.swapaxes(-1, -2)) * between
    queries = queries * mx.exp(cumulative)[..., None]
    last = cumulative[..., -1:]
    carried = keys * mx.exp(last - cumulative)[..., None]
    fade = mx.exp(last)[..., None]  # [chunks, heads, 1, 1]
    outputs = []
    for chunk in range(queries.shape[0]):
        delta = from_values[chunk] - from_state[chunk] @ state.swapaxes(-1, -2)
        outputs.append(queries[chunk] @ state.swapaxes(-1, -2) + scores[chunk] @ delta)
        state = state * fade[chunk] + delta.swapaxes(-1, -2) @ carried[chunk]
    y = mx.stack(outputs).swapaxes(1, 2)  # [chunks, CHUNK, heads, value_dim]
    return y.reshape(-1, *y.shape[2:])[:rows], state


def _unit_lower_inverse(strict: mx.array) -> mx.array:
    """(I - A)^-1 for strictly lower triangular A [..., CHUNK, CHUNK].

    A is nilpotent, so the Neumann series ends: (I + A)(I + A^2)(I + A^4)(I + A^8).
    """
    identity = mx.eye(CHUNK)
    inverse, power = identity + strict, strict
    for _ in range((CHUNK - 1).bit_length() - 1):
        power = power @ power
        inverse = inverse + inverse @ power
    return inverse
