"""Routed experts against float64 products, and pairs in any grouping."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels.experts import ExpertWeights, combine, experts_apart
from tests.backends import Operations, each_backend, each_exact_backend, same_bits
from tests.kernels.weights import PACKINGS, normal, some_weight

HIDDEN, INNER = 128, 256


def bank_of(rng, slots, packings, hidden=HIDDEN, inner=INNER):
    """A bank and its three float64 stacks; packings of gate, up, down."""
    shapes = [(slots, inner, hidden)] * 2 + [(slots, hidden, inner)]
    made = [some_weight(rng, *s, packing=p) for s, p in zip(shapes, packings, strict=True)]
    return ExpertWeights(*(weight for weight, _ in made)), [matrix for _, matrix in made]


def experts64(x, matrices, slots):
    gate, up, down = matrices
    out = np.empty((*slots.shape, down.shape[1]))
    for row, column in np.ndindex(*slots.shape):
        slot, wide = slots[row, column], x[row].astype(np.float64)
        inner = gate[slot] @ wide
        out[row, column] = down[slot] @ (inner / (1 + np.exp(-inner)) * (up[slot] @ wide))
    return out


@each_backend
@pytest.mark.parametrize("packing", [None, *PACKINGS])
def test_every_expert_of_a_row_apart(backend, packing):
    rng = np.random.default_rng(0)
    bank, matrices = bank_of(rng, 5, [packing] * 3)
    x = normal(rng, 4, HIDDEN)
    slots = np.array([[0, 4], [4, 1], [2, 0], [1, 0]], np.int32)
    y = Operations(backend)(experts_apart, x, bank, slots)
    assert y.shape == (4, 2, HIDDEN)
    np.testing.assert_allclose(y, experts64(x, matrices, slots), atol=2e-5)


@each_backend
def test_projections_packed_differently_and_odd_dense_sizes(backend):
    rng = np.random.default_rng(1)
    on = Operations(backend)
    x, slots = normal(rng, 3, HIDDEN), np.array([[1, 0, 2], [0, 1, 2], [2, 1, 0]], np.int32)
    bank, matrices = bank_of(rng, 3, [(4, 32), None, (8, 64)])
    expected = experts64(x, matrices, slots)
    np.testing.assert_allclose(on(experts_apart, x, bank, slots), expected, atol=2e-5)
    bank, matrices = bank_of(rng, 3, [None] * 3, hidden=37, inner=11)
    expected = experts64(x[:, :37], matrices, slots)
    y = on(experts_apart, np.ascontiguousarray(x[:, :37]), bank, slots)
    np.testing.assert_allclose(y, expected, atol=2e-5)


@each_backend
def test_combine_is_the_weighted_sum(backend):
    rng = np.random.default_rng(2)
    outputs, weights = normal(rng, 6, 3, 50), rng.random((6, 3)).astype(np.float32)
    expected = np.einsum("rkh,rk->rh", outputs.astype(np.float64), weights.astype(np.float64))
    y = Operations(backend)(combine, outputs, weights)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, atol=1e-6)


@each_exact_backend
@pytest.mark.parametrize("packing", [None, (4, 32), (3, 64), (8, 64)])
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 25), top_k=st.integers(1, 5))
@settings(max_examples=8, deadline=None)
def test_a_pair_has_the_same_bits_in_any_company(backend, packing, seed, rows, top_k):
    """Alone, with other rows, with other experts, and with its expert in another slot."""
    rng = np.random.default_rng(seed)
    bank, _ = bank_of(rng, 8, [packing] * 3)
    x = normal(rng, rows, HIDDEN)
    slots = np.stack([rng.permutation(8)[:top_k] for _ in range(rows)]).astype(np.int32)
    weights = rng.random((rows, top_k)).astype(np.float32)
    on = Operations(backend)
    y = on(experts_apart, x, bank, slots)
    total = on(combine, y, weights)

    order = rng.permutation(rows)[: rng.integers(1, rows + 1)]
    assert same_bits(on(experts_apart, x[order], bank, slots[order]), y[order])
    assert same_bits(on(combine, y[order], weights[order]), total[order])
    for row in order[:3]:
        for column in range(top_k):
            alone = on(experts_apart, x[row : row + 1], bank, slots[row : row + 1, [column]])
            assert same_bits(alone[0, 0], y[row, column])

    moved = rng.permutation(8)  # slot s holds what slot moved[s] held
    back = np.argsort(moved).astype(np.int32)
    again = ExpertWeights(*(_move(w, moved) for w in (bank.gate, bank.up, bank.down)))
    assert same_bits(on(experts_apart, x, again, back[slots]), y)


def _move(weight, order):
    return weight._each(lambda array: mx.array(np.array(array)[order]))
