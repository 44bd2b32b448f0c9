"""Normalizations and gates against float64 formulas."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels.norm import gated_rms_norm, rms_norm, sigmoid_gate, swiglu
from tests.backends import REFERENCE, Operations, each_backend, each_exact_backend, same_bits
from tests.kernels.weights import normal

SIZES = [1, 3, 32, 64, 100, 256, 1031]


def norm64(x, weight, eps):
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def sigmoid64(x):
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def near(found, expected):
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


@each_backend
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(backend, size):
    rng = np.random.default_rng(size)
    x, weight = normal(rng, 5, size) * 3, normal(rng, size)
    on = Operations(backend)
    near(on(rms_norm, x, weight, 1e-6), norm64(x, weight, 1e-6))
    near(on(rms_norm, x, None, 0.5), norm64(x, 1.0, 0.5))


@each_backend
def test_rms_norm_of_heads_and_of_zeros(backend):
    rng = np.random.default_rng(0)
    x, weight = normal(rng, 4, 3, 48), normal(rng, 48)
    x[1, 2] = 0
    y = Operations(backend)(rms_norm, x, weight, 1e-6)
    near(y, norm64(x, weight, 1e-6))
    assert (y[1, 2] == 0).all()


@pytest.mark.parametrize("size", SIZES)
def test_gated_rms_norm(size):
    rng = np.random.default_rng(size)
    x, gate, weight = normal(rng, 2, 3, size), normal(rng, 2, 3, size) * 4, normal(rng, size)
    y = Operations(REFERENCE)(gated_rms_norm, x, gate, weight, 1e-6)
    near(y, gate * sigmoid64(gate) * norm64(x, weight, 1e-6))


@each_backend
@pytest.mark.parametrize("size", SIZES)
def test_swiglu_and_sigmoid_gate(backend, size):
    rng = np.random.default_rng(size)
    gate, up = normal(rng, 4, size) * 5, normal(rng, 4, size)
    on = Operations(backend)
    near(on(swiglu, gate, up), gate * sigmoid64(gate) * up)
    on = Operations(REFERENCE)
    near(on(sigmoid_gate, up, gate), up * sigmoid64(gate))
    near(on(sigmoid_gate, up, gate[:, :1]), up * sigmoid64(gate[:, :1]))


@each_backend
@pytest.mark.filterwarnings("error")
def test_gates_of_extreme_values_saturate(backend):
    gate = np.array([[-200.0, -90.0, 0.0, 90.0, 200.0]], np.float32)
    up = np.ones_like(gate)
    on = Operations(backend)
    np.testing.assert_allclose(on(swiglu, gate, up), [[0, 0, 0, 90, 200]], atol=1e-30)
    on = Operations(REFERENCE)
    np.testing.assert_allclose(on(sigmoid_gate, up, gate), [[0, 0, 0.5, 1, 1]], atol=1e-30)


@each_backend
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_stay_visible(backend, bad):
    x = np.ones((2, 40), np.float32)
    x[1, 17] = bad
    on = Operations(backend)
    ones = np.ones(40, np.float32)
    for y in (on(rms_norm, x, ones, 1e-6), on(swiglu, np.ones_like(x), x)):
        assert np.isfinite(y[0]).all()
        assert not np.isfinite(y[1]).all()


@each_exact_backend
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 25), size=st.integers(1, 300))
@settings(max_examples=30, deadline=None)
def test_a_row_has_the_same_bits_in_any_company(backend, seed, rows, size):
    rng = np.random.default_rng(seed)
    x, gate, weight = normal(rng, rows, size), normal(rng, rows, size), normal(rng, size)
    on = Operations(backend)

    def all_of(index):
        both = on(rms_norm, x[index], weight, 1e-6), on(swiglu, gate[index], x[index])
        if backend is not REFERENCE:  # where the others are parts of whole sub-layers
            return both
        return (
            *both,
            on(gated_rms_norm, x[index], gate[index], weight, 1e-6),
            on(sigmoid_gate, x[index], gate[index]),
            on(sigmoid_gate, x[index], gate[index][:, :1]),
        )

    whole = all_of(np.arange(rows))
    order = rng.permutation(rows)[: rng.integers(1, rows + 1)]
    for some in (order, order[:1]):
        for part, full in zip(all_of(some), whole, strict=True):
            assert same_bits(part, full[some])
