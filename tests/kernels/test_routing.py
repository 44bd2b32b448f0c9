"""Routing against a sort and a softmax in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels.linear import Piece
from specdec.kernels.routing import route
from tests.backends import Operations, each_backend, each_exact_backend, fetch, same_bits


def route64(logits, top_k, normalize):
    experts = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    wide = logits.astype(np.float64)
    weights = np.exp(wide - wide.max(1, keepdims=True))
    chosen = np.take_along_axis(weights, experts, axis=1)
    return experts, chosen / (chosen if normalize else weights).sum(1, keepdims=True)


def routed(backend, logits, top_k, normalize):
    """Experts and weights; the logits stand among other columns."""
    rows, experts = logits.shape
    wide = np.full((rows, experts + 3), 1e9, np.float32)
    wide[:, 2 : 2 + experts] = logits
    found = route(Piece(Operations(backend).place(wide), 2, experts), top_k, normalize)
    return fetch((found.experts, found.weights))


@each_backend
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (8, 2), (32, 4), (128, 8), (7, 7)])
def test_route(backend, normalize, experts, top_k):
    logits = np.random.default_rng(experts).normal(0, 3, (9, experts)).astype(np.float32)
    chosen, weights = routed(backend, logits, top_k, normalize)
    expected = route64(logits, top_k, normalize)
    assert chosen.dtype == np.int32
    assert weights.dtype == np.float32
    assert np.array_equal(chosen, expected[0])
    np.testing.assert_allclose(weights, expected[1], rtol=3e-6)


@each_backend
def test_the_lower_expert_goes_first_among_equals(backend):
    logits = np.array([[1, 3, 3, 3, 1], [0, 0, 0, 0, 0], [-0.0, 0.0, -1, 0.0, 2]], np.float32)
    chosen, weights = routed(backend, logits, 3, True)
    assert chosen.tolist() == [[1, 2, 3], [0, 1, 2], [4, 0, 1]]
    np.testing.assert_allclose(weights[:2], 1 / 3, rtol=1e-6)


@each_backend
@pytest.mark.parametrize("shift", [0.0, 3e4, -3e4])
def test_large_logits_do_not_overflow(backend, shift):
    logits = np.array([[100, 0, -100, 99]], np.float32) + np.float32(shift)
    for normalize in (True, False):
        chosen, weights = routed(backend, logits, 2, normalize)
        assert chosen.tolist() == [[0, 3]]
        np.testing.assert_allclose(weights, [[0.7310586, 0.2689414]], rtol=2e-3)


@each_backend
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("place", [0, 2, 5])
def test_nan_among_the_logits_is_not_routed_around(backend, normalize, place):
    """A broken router row must reach the logits' check, not make its expert silently unused."""
    logits = np.tile(np.arange(6, dtype=np.float32), (2, 1))
    logits[1, place] = np.nan
    _, weights = routed(backend, logits, 2, normalize)
    assert np.isfinite(weights[0]).all()
    assert np.isnan(weights[1]).any()


@each_exact_backend
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 25),
    experts=st.integers(2, 70),
    normalize=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_a_row_has_the_same_bits_in_any_company(backend, seed, rows, experts, normalize):
    rng = np.random.default_rng(seed)
    # few distinct values: ties
    logits = rng.integers(-6, 6, (rows, experts)).astype(np.float32) / 4
    top_k = int(rng.integers(1, experts + 1))
    chosen, weights = routed(backend, logits, top_k, normalize)
    for row in range(rows):
        alone = routed(backend, logits[row : row + 1], top_k, normalize)
        assert same_bits(alone[0][0], chosen[row])
        assert same_bits(alone[1][0], weights[row])
