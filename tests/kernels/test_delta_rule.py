"""Convolution and gated delta rule against float64 recurrences, and trees against decoding."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels.delta_rule import (
    convolve,
    convolve_prompt,
    gates,
    normalize_keys,
    recur_prompt,
    recur_tree,
    replay_updates,
)
from specdec.kernels.layout import TreeLayout
from tests.backends import NOT_EXACT, REFERENCE, Operations, fetch, same_bits
from tests.kernels.weights import normal
from tests.trees import path_to, random_parents, trees

# Plain MLX alone: kernels/cpu has the mixer whole, tested in test_gated_delta.py.
each_backend = pytest.mark.parametrize("backend", [pytest.param(REFERENCE, id="reference")])
each_exact_backend = pytest.mark.parametrize(
    "backend", [pytest.param(REFERENCE, id="reference", marks=NOT_EXACT)]
)

# (key heads, value heads, key_dim, value_dim)
SHAPES = [(1, 1, 16, 16), (2, 4, 16, 32), (2, 2, 64, 64), (4, 8, 32, 48), (1, 3, 128, 128)]


class Rows(NamedTuple):
    """Inputs of the recurrence, as a layer makes them: unit keys, scaled queries."""

    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    log_decay: np.ndarray
    beta: np.ndarray

    def at(self, rows) -> "Rows":
        return Rows(*(np.ascontiguousarray(array[rows]) for array in self))


def some_rows(rng, count, shape) -> tuple[Rows, np.ndarray]:
    """Rows and a state."""
    key_heads, heads, key_dim, value_dim = shape
    keys = normal(rng, count, key_heads, key_dim)
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    queries = normal(rng, count, key_heads, key_dim) / np.float32(key_dim)
    values = normal(rng, count, heads, value_dim)
    log_decay = -rng.exponential(0.3, (count, heads)).astype(np.float32)
    beta = rng.random((count, heads)).astype(np.float32)
    return Rows(queries, keys, values, log_decay, beta), normal(rng, heads, value_dim, key_dim)


def recur64(rows: Rows, state, path):
    """The outputs and states after every row of a path, one head at a time."""
    state = state.astype(np.float64)
    outputs, states = [], []
    heads = state.shape[0]
    for row in path:
        y = np.empty(state.shape[:2])
        new = np.empty_like(state)
        for head in range(heads):
            key_head = head // (heads // rows.keys.shape[1])
            key = rows.keys[row, key_head].astype(np.float64)
            faded = state[head] * np.exp(np.float64(rows.log_decay[row, head]))
            delta = np.float64(rows.beta[row, head]) * (rows.values[row, head] - faded @ key)
            new[head] = faded + np.outer(delta, key)
            y[head] = new[head] @ rows.queries[row, key_head].astype(np.float64)
        state = new
        outputs.append(y)
        states.append(state)
    return np.array(outputs), states


def on_tree(backend, rows, state, parents):
    """y on the host, and the tape as it is."""
    on = Operations(backend)
    tree = TreeLayout(np.asarray(parents, np.int32))
    q, k, v, decay, beta = (on.place(array) for array in rows)
    y, tape = recur_tree(q, k, v, decay, beta, on.place(state), tree)
    return fetch(y), tape


def decode(backend, rows: Rows, state, path):
    """Token by token: the root of a tree of one, committed, for every row of a path."""
    outputs = []
    for row in path:
        y, tape = on_tree(backend, rows.at([row]), state, [-1])
        state = fetch(replay_updates([Operations(backend).place(state)], [tape], [0])[0])
        outputs.append(y[0])
    return np.array(outputs), state


@each_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_recurrence_over_a_tree(backend, shape):
    rng = np.random.default_rng(0)
    for count in (1, 2, 13, 25):
        parents = random_parents(rng, count)
        rows, state = some_rows(rng, count, shape)
        y, _ = on_tree(backend, rows, state, parents)
        assert y.dtype == np.float32
        for row in range(count):
            expected = recur64(rows, state, path_to(parents, row))[0][-1]
            np.testing.assert_allclose(y[row], expected, atol=5e-6)


@each_backend
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 50])
def test_recurrence_over_a_prompt(backend, shape, count):
    rng = np.random.default_rng(count)
    rows, state = some_rows(rng, count, shape)
    y, last = Operations(backend)(recur_prompt, *rows, state)
    expected, states = recur64(rows, state, range(count))
    np.testing.assert_allclose(y, expected, atol=2e-5)
    np.testing.assert_allclose(last, states[-1], atol=2e-5)


@each_backend
def test_a_prompt_with_strong_and_with_no_decay(backend):
    """exp of large sums: -100 per token, and 0."""
    rng = np.random.default_rng(1)
    rows, state = some_rows(rng, 40, (2, 4, 16, 32))
    decay = np.where(rng.random((40, 4)) < 0.5, -100.0, 0.0).astype(np.float32)
    rows = rows._replace(log_decay=decay)
    y, last = Operations(backend)(recur_prompt, *rows, state)
    expected, states = recur64(rows, state, range(40))
    np.testing.assert_allclose(y, expected, atol=2e-5)
    np.testing.assert_allclose(last, states[-1], atol=2e-5)


@each_backend
def test_the_state_and_the_inputs_are_left_as_they_are(backend):
    rng = np.random.default_rng(2)
    rows, state = some_rows(rng, 9, (2, 4, 16, 32))
    on = Operations(backend)
    placed = [on.place(array) for array in (*rows, state)]
    q, k, v, decay, beta, committed = placed
    tree = TreeLayout(random_parents(rng, 9))
    _, tape = recur_tree(q, k, v, decay, beta, committed, tree)
    replay_updates([placed[-1]], [tape], [0])
    recur_prompt(*placed)
    for array, before in zip(placed, (*rows, state), strict=True):
        assert same_bits(fetch(array), before)


@each_exact_backend
@given(
    seed=st.integers(0, 2**32 - 1),
    parents=trees(),
    shape=st.sampled_from(SHAPES),
    layers=st.integers(1, 3),
)
@settings(max_examples=25, deadline=None)
def test_rows_and_replayed_states_have_the_bits_of_decoding(backend, seed, parents, shape, layers):
    rng = np.random.default_rng(seed)
    last = int(rng.integers(len(parents)))
    path = path_to(parents, last)
    cases = [some_rows(rng, len(parents), shape) for _ in range(layers)]
    tapes = []
    for rows, state in cases:
        y, tape = on_tree(backend, rows, state, parents)
        assert same_bits(decode(backend, rows, state, path)[0], y[path])
        tapes.append(tape)
    states = [Operations(backend).place(state) for _, state in cases]
    for done in {len(path), int(rng.integers(1, len(path) + 1))}:
        replayed = fetch(replay_updates(states, tapes, path[:done]))
        for (rows, state), new in zip(cases, replayed, strict=True):
            assert same_bits(decode(backend, rows, state, path[:done])[1], new)


@each_exact_backend
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(2, 25))
@settings(max_examples=15, deadline=None)
def test_a_row_of_a_tree_has_the_same_bits_in_any_order_of_the_rows(backend, seed, rows):
    rng = np.random.default_rng(seed)
    parents = random_parents(rng, rows)
    inputs, state = some_rows(rng, rows, (2, 4, 16, 32))
    y, _ = on_tree(backend, inputs, state, parents)
    order = [0]
    while len(order) < rows:
        ready = [r for r in range(rows) if r not in order and parents[r] in order]
        order.append(int(rng.choice(ready)))
    order = order[: int(rng.integers(1, rows + 1))]
    shuffled = [-1, *(order.index(parents[r]) for r in order[1:])]
    again, _ = on_tree(backend, inputs.at(order), state, shuffled)
    assert same_bits(again, y[order])


def convolve64(seen, weight):
    """The last output of a causal convolution over `seen` [tokens, channels], then SiLU."""
    taps = weight.shape[0]
    total = (seen[-taps:].astype(np.float64) * weight).sum(0)
    return total / (1 + np.exp(-total))


@each_backend
@pytest.mark.parametrize("taps", [2, 3, 4, 5])
def test_convolution_over_a_tree_and_a_prompt(backend, taps):
    rng = np.random.default_rng(taps)
    on = Operations(backend)
    for rows in (1, 2, 3, 25):
        parents = random_parents(rng, rows)
        x, state, weight = normal(rng, rows, 72), normal(rng, taps - 1, 72), normal(rng, taps, 72)
        windows = TreeLayout(parents).windows(taps)
        y = on(convolve, x, state, windows, weight, keep=(2,))
        for row in range(rows):
            seen = np.concatenate([state, x[path_to(parents, row)]])
            np.testing.assert_allclose(y[row], convolve64(seen, weight), atol=3e-6)
        y = on(convolve_prompt, x, state, weight)
        for row in range(rows):
            seen = np.concatenate([state, x[: row + 1]])
            np.testing.assert_allclose(y[row], convolve64(seen, weight), atol=3e-6)


@each_exact_backend
@given(seed=st.integers(0, 2**32 - 1), parents=trees(), taps=st.integers(2, 5))
@settings(max_examples=25, deadline=None)
def test_a_convolved_row_has_the_bits_of_decoding_its_path(backend, seed, parents, taps):
    rng = np.random.default_rng(seed)
    x, state = normal(rng, len(parents), 40), normal(rng, taps - 1, 40)
    weight = normal(rng, taps, 40)
    on = Operations(backend)
    y = on(convolve, x, state, TreeLayout(parents).windows(taps), weight, keep=(2,))
    root = TreeLayout.chain(1).windows(taps)
    path = path_to(parents, int(rng.integers(len(parents))))
    for row in path:
        alone = on(convolve, x[[row]], state, root, weight, keep=(2,))
        assert same_bits(alone[0], y[row])
        state = np.concatenate([state, x[[row]]])[1:]


@each_backend
@pytest.mark.parametrize("dim", [1, 16, 48, 128])
def test_keys_have_length_one_and_queries_are_scaled(backend, dim):
    rng = np.random.default_rng(dim)
    q, k = normal(rng, 5, 3, dim) * 4, normal(rng, 5, 3, dim) / 4
    k[2, 1] = 0
    queries, keys = Operations(backend)(normalize_keys, q, k)

    def unit(x):
        x = x.astype(np.float64)
        return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)

    np.testing.assert_allclose(queries, unit(q) / np.sqrt(dim), atol=1e-6)
    np.testing.assert_allclose(keys, unit(k), atol=1e-6)


@each_backend
@pytest.mark.filterwarnings("error")
def test_gates(backend):
    rng = np.random.default_rng(0)
    a, b = normal(rng, 30, 8) * 10, normal(rng, 30, 8) * 5
    a[0], b[0], b[1] = 80, -80, 200  # softplus is a itself
    b[2] = -200
    a_log, dt_bias = np.log(rng.uniform(1, 16, 8)).astype(np.float32), normal(rng, 8)
    log_decay, beta = Operations(backend)(gates, a, b, a_log, dt_bias)
    assert log_decay.dtype == beta.dtype == np.float32
    step = np.logaddexp(a.astype(np.float64) + dt_bias, 0)
    np.testing.assert_allclose(log_decay, -np.exp(a_log.astype(np.float64)) * step, rtol=3e-6)
    expected = 1 / (1 + np.exp(-b.astype(np.float64)))
    np.testing.assert_allclose(beta, expected, rtol=1e-5, atol=1e-37)


@each_exact_backend
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 25), heads=st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_keys_and_gates_have_the_same_bits_in_any_company(backend, seed, rows, heads):
    rng = np.random.default_rng(seed)
    q, k = normal(rng, rows, heads, 24), normal(rng, rows, heads, 24)
    a, b, a_log, dt_bias = (normal(rng, *shape) for shape in ((rows, heads),) * 2 + ((heads,),) * 2)
    on = Operations(backend)
    whole = (*on(normalize_keys, q, k), *on(gates, a, b, a_log, dt_bias))
    order = rng.permutation(rows)[: rng.integers(1, rows + 1)]
    for some in (order, order[:1]):
        part = on(normalize_keys, q[some], k[some]) + on(gates, a[some], b[some], a_log, dt_bias)
        for array, full in zip(part, whole, strict=True):
            assert same_bits(array, full[some])
