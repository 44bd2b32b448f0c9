"""The mixer of a gated delta layer: against float64, and rows of trees against decoding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels.gated_delta import DeltaInputs, DeltaWeights, mix_prompt, mix_tree, replay
from specdec.kernels.layout import TreeLayout
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm
from tests.backends import Operations, each_backend, each_exact_backend, fetch, same_bits
from tests.kernels.weights import normal
from tests.trees import path_to, random_parents, trees

# (key heads, value heads, key_dim, value_dim, taps)
SHAPES = [(1, 1, 16, 16, 4), (2, 4, 16, 32, 3), (4, 8, 24, 40, 4), (1, 3, 64, 128, 2)]
EPS = 1e-6


class Mixer:
    """A layer's weights and a state, and the operations on one backend."""

    def __init__(self, backend, rng, shape) -> None:
        self.on, self.shape = Operations(backend), shape
        key_heads, heads, key_dim, value_dim, taps = shape
        self.keys, self.values = key_heads * key_dim, heads * value_dim
        self.channels = 2 * self.keys + self.values
        self.conv_weight = normal(rng, taps, self.channels)
        self.a_log, self.dt_bias = normal(rng, heads) / 4, normal(rng, heads)
        self.norm = normal(rng, value_dim)
        self.conv = normal(rng, taps - 1, self.channels)
        self.state = normal(rng, heads, value_dim, key_dim)
        place = self.on.place
        norm = Norm(place(self.norm), EPS)
        conv, a_log, dt_bias = (place(a) for a in (self.conv_weight, self.a_log, self.dt_bias))
        sizes = key_heads, heads, key_dim, value_dim
        self.weights = DeltaWeights(conv, a_log, dt_bias, norm, *sizes)

    def some_rows(self, rng, count) -> np.ndarray:
        """qkv, z, b and a of each row, side by side."""
        return normal(rng, count, self.channels + self.values + 2 * self.shape[1])

    def inputs(self, rows) -> DeltaInputs:
        widths = self.channels, self.values, self.shape[1], self.shape[1]
        starts = np.cumsum([0, *widths])
        placed = self.on.place(rows)
        return DeltaInputs(
            *(Piece(placed, int(s), w) for s, w in zip(starts, widths, strict=False))
        )

    def tree(self, rows, parents, conv=None, state=None):
        """y on the host, and the tape as it is."""
        conv, state = self._from(conv, state)
        layout = TreeLayout(np.asarray(parents, np.int32))
        y, tape = mix_tree(self.inputs(rows), self.weights, conv, state, layout)
        return fetch(y), tape

    def after(self, tape, path, conv=None, state=None):
        """Convolution rows and state after a path, on the host."""
        conv, state = self._from(conv, state)
        convs, states = replay([conv], [state], [tape], list(path))
        return np.array(fetch(convs[0])), np.array(fetch(states[0]))

    def decode(self, rows, path):
        """Token by token: a tree of one, committed, for every row of a path."""
        outputs, conv, state = [], self.conv, self.state
        for row in path:
            y, tape = self.tree(rows[[row]], [-1], conv, state)
            conv, state = self.after(tape, [0], conv, state)
            outputs.append(y[0])
        return np.array(outputs), conv, state

    def _from(self, conv, state):
        conv, state = (self.conv, self.state) if conv is None else (conv, state)
        return self.on.place(conv), self.on.place(state)

    def mix64(self, rows, path):
        """The formulas in float64 along a path: the last row's output, rows and state after."""
        key_heads, heads, key_dim, value_dim, taps = self.shape
        seen = np.concatenate([self.conv, rows[path, : self.channels]]).astype(np.float64)
        state = self.state.astype(np.float64)
        for step, row in enumerate(path):
            mixed = (seen[step : step + taps] * self.conv_weight).sum(0)
            mixed = mixed / (1 + np.exp(-mixed))
            q, k = mixed[: 2 * self.keys].reshape(2, key_heads, key_dim)
            q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
            q, k = (np.repeat(x, heads // key_heads, 0) for x in (q / np.sqrt(key_dim), k))
            v = mixed[2 * self.keys :].reshape(heads, value_dim)
            z, b, a = np.split(rows[row, self.channels :].astype(np.float64), [-2 * heads, -heads])
            decay = np.exp(-np.exp(self.a_log) * np.logaddexp(a + self.dt_bias, 0))
            state = state * decay[:, None, None]
            delta = (v - np.einsum("hvk,hk->hv", state, k)) / (1 + np.exp(-b))[:, None]
            state = state + delta[:, :, None] * k[:, None]
            y = np.einsum("hvk,hk->hv", state, q)
            y = y / np.sqrt((y * y).mean(-1, keepdims=True) + EPS) * self.norm
            z = z.reshape(heads, value_dim)
        return (y * z / (1 + np.exp(-z))).reshape(-1), seen[len(path) :], state


@each_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_trees_prompts_and_replayed_paths_follow_the_formulas(backend, shape):
    rng = np.random.default_rng(sum(shape))
    for count in (1, 2, 9, 25):
        mixer, parents = Mixer(backend, rng, shape), random_parents(rng, count)
        rows = mixer.some_rows(rng, count)
        y, tape = mixer.tree(rows, parents)
        for row in range(count):
            path = path_to(parents, row)
            expected, conv, state = mixer.mix64(rows, path)
            np.testing.assert_allclose(y[row], expected, atol=1e-4)
            after = mixer.after(tape, path)
            np.testing.assert_allclose(after[0], conv, atol=1e-6)
            np.testing.assert_allclose(after[1], state, atol=1e-5)
        prompt = mix_prompt(mixer.inputs(rows), mixer.weights, *mixer._from(None, None))
        for ours, expected in zip(prompt, mixer.mix64(rows, range(count)), strict=True):
            ours = np.array(fetch(ours))
            last = ours[-1] if expected.ndim == 1 else ours
            np.testing.assert_allclose(last, expected, atol=1e-4)


@each_exact_backend
@given(seed=st.integers(0, 2**32 - 1), parents=trees(), shape=st.sampled_from(SHAPES))
@settings(max_examples=25, deadline=None)
def test_rows_and_replayed_states_have_the_bits_of_decoding(backend, seed, parents, shape):
    rng = np.random.default_rng(seed)
    mixer = Mixer(backend, rng, shape)
    rows = mixer.some_rows(rng, len(parents))
    y, tape = mixer.tree(rows, parents)
    path = path_to(parents, int(rng.integers(len(parents))))
    assert same_bits(mixer.decode(rows, path)[0], y[path])
    for done in {len(path), int(rng.integers(1, len(path) + 1))}:
        _, conv, state = mixer.decode(rows, path[:done])
        after = mixer.after(tape, path[:done])
        assert same_bits(after[0], conv)
        assert same_bits(after[1], state)


@each_exact_backend
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(2, 25))
@settings(max_examples=15, deadline=None)
def test_a_row_of_a_tree_has_the_same_bits_in_any_order_of_the_rows(backend, seed, rows):
    rng = np.random.default_rng(seed)
    mixer, parents = Mixer(backend, rng, SHAPES[1]), random_parents(rng, rows)
    inputs = mixer.some_rows(rng, rows)
    y, _ = mixer.tree(inputs, parents)
    order = [0]
    while len(order) < rows:
        ready = [r for r in range(rows) if r not in order and parents[r] in order]
        order.append(int(rng.choice(ready)))
    order = order[: int(rng.integers(1, rows + 1))]
    shuffled = [-1, *(order.index(parents[r]) for r in order[1:])]
    assert same_bits(mixer.tree(inputs[order], shuffled)[0], y[order])


@each_backend
def test_the_committed_state_is_left_as_it_is(backend):
    rng = np.random.default_rng(2)
    mixer = Mixer(backend, rng, SHAPES[1])
    rows = mixer.some_rows(rng, 9)
    conv, state = (mixer.on.place(array) for array in (mixer.conv, mixer.state))
    layout = TreeLayout(random_parents(rng, 9))
    _, tape = mix_tree(mixer.inputs(rows), mixer.weights, conv, state, layout)
    replay([conv], [state], [tape], [0])
    mix_prompt(mixer.inputs(rows), mixer.weights, conv, state)
    assert same_bits(fetch(conv), mixer.conv)
    assert same_bits(fetch(state), mixer.state)


@pytest.mark.filterwarnings("error")
@each_backend
def test_gates_far_from_zero(backend):
    """Decays of 0 and of 1, steps that are all or nothing."""
    rng = np.random.default_rng(3)
    mixer = Mixer(backend, rng, SHAPES[1])
    rows = mixer.some_rows(rng, 4)
    rows[:, -8:] = rng.choice([-200, -80, 80, 200], (4, 8))
    y, _ = mixer.tree(rows, [-1, 0, 1, 2])
    np.testing.assert_allclose(y[3], mixer.mix64(rows, range(4))[0], atol=1e-4)
