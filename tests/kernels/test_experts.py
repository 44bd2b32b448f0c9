"""Routed experts against float64 products, and pairs in any grouping."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels.experts import (
    ExpertWeights,
    SharedExpert,
    combine,
    experts_apart,
    feed_forward,
    shared_hidden,
)
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm
from specdec.kernels.routing import Routing
from tests.backends import Operations, each_backend, each_exact_backend, fetch, same_bits
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


def apart(backend, x, bank, slots):
    """experts_apart of x as it is (its rows are normalized), expert e in slot e."""
    on = Operations(backend)
    norm = Norm(on.place(np.ones(x.shape[1], np.float32)), 0.0)
    routing = Routing(on.place(slots), None)
    table = on.place(np.arange(len(bank.down.data), dtype=np.int32))
    return fetch(experts_apart(on.place(x), norm, on.place(bank), routing, table))


def unit(rng, rows, size):
    """Rows that a norm leaves as they are, but for the last bits."""
    x = rng.standard_normal((rows, size))
    return (x / np.sqrt((x * x).mean(1, keepdims=True))).astype(np.float32)


@each_backend
@pytest.mark.parametrize("packing", [None, *PACKINGS])
def test_every_expert_of_a_row_apart(backend, packing):
    rng = np.random.default_rng(0)
    bank, matrices = bank_of(rng, 5, [packing] * 3)
    x = unit(rng, 4, HIDDEN)
    slots = np.array([[0, 4], [4, 1], [2, 0], [1, 0]], np.int32)
    y = apart(backend, x, bank, slots)
    assert y.shape == (4, 2, HIDDEN)
    np.testing.assert_allclose(y, experts64(x, matrices, slots), atol=2e-5)


@each_backend
def test_projections_packed_differently_and_odd_dense_sizes(backend):
    rng = np.random.default_rng(1)
    x, slots = unit(rng, 3, HIDDEN), np.array([[1, 0, 2], [0, 1, 2], [2, 1, 0]], np.int32)
    bank, matrices = bank_of(rng, 3, [(4, 32), None, (8, 64)])
    np.testing.assert_allclose(
        apart(backend, x, bank, slots), experts64(x, matrices, slots), atol=2e-5
    )
    bank, matrices = bank_of(rng, 3, [None] * 3, hidden=37, inner=11)
    x = unit(rng, 3, 37)
    np.testing.assert_allclose(
        apart(backend, x, bank, slots), experts64(x, matrices, slots), atol=2e-5
    )


@each_backend
@pytest.mark.parametrize("shared", [None, (4, 32), (8, 64)])
def test_feed_forward_is_the_residual_and_the_weighted_sum(backend, shared):
    """The whole at once, and from experts that came in two waves, to the same bits."""
    rng = np.random.default_rng(2)
    on = Operations(backend)
    bank, matrices = bank_of(rng, 6, [(4, 32)] * 3)
    x, scale = normal(rng, 5, HIDDEN), normal(rng, HIDDEN)
    chosen = np.stack([rng.permutation(6)[:3] for _ in range(5)]).astype(np.int32)
    weights = rng.random((5, 3)).astype(np.float32)
    wide = x.astype(np.float64)
    h = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-6) * scale
    table = np.array([5, 3, 1, 0, 2, 4], np.int32)
    outputs = experts64(h, matrices, table[chosen])
    expected = wide + np.einsum("rkh,rk->rh", outputs, weights.astype(np.float64))
    others: list = [None, None]
    if shared:
        alone, whole = bank_of(rng, 1, [shared] * 3, inner=64)
        gate = normal(rng, 5, 4)
        others = [
            SharedExpert(*(_first(on.place(w)) for w in (alone.gate, alone.up, alone.down))),
            Piece(on.place(gate), 2, 1),
        ]
        output = experts64(h, whole, np.zeros((5, 1), np.int32))[:, 0]
        expected += output / (1 + np.exp(-gate[:, 2:3].astype(np.float64)))
    norm = Norm(on.place(scale), 1e-6)
    routing = Routing(on.place(chosen), on.place(weights))
    same = on.place(x), norm
    bank = on.place(bank)
    y = fetch(feed_forward(*same, bank, routing, on.place(table), *others))
    np.testing.assert_allclose(y, expected, atol=1e-4)

    waves = [np.where(table % 2 == wave, table, -1).astype(np.int32) for wave in (0, 1)]
    parts = [experts_apart(*same, bank, routing, on.place(wave)) for wave in waves]
    hidden = shared_hidden(*same, others[0]) if shared else None
    whole = combine(same[0], parts[0] + parts[1], routing, others[0], hidden, others[1])
    assert same_bits(fetch(whole), y)


@each_exact_backend
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    top_k=st.integers(1, 4),
    waves=st.integers(1, 4),
    shared=st.sampled_from([None, (4, 32), (8, 64)]),
)
@settings(max_examples=25, deadline=None)
def test_any_waves_and_the_shared_expert_ahead_give_the_bits_of_all_at_once(
    backend, seed, rows, top_k, waves, shared
):
    """Whichever experts come in whichever wave, a row adds them up in the order of its routing."""
    rng = np.random.default_rng(seed)
    on = Operations(backend)
    bank = on.place(bank_of(rng, 6, [(4, 32)] * 3)[0])
    x, norm = on.place(normal(rng, rows, HIDDEN)), Norm(on.place(normal(rng, HIDDEN)), 1e-6)
    chosen = np.stack([rng.permutation(6)[:top_k] for _ in range(rows)]).astype(np.int32)
    weights = rng.random((rows, top_k)).astype(np.float32)
    routing = Routing(on.place(chosen), on.place(weights))
    table, of_wave = rng.permutation(6).astype(np.int32), rng.integers(0, waves, 6)
    own = gate = hidden = None
    if shared:
        alone, _ = bank_of(rng, 1, [shared] * 3, inner=64)
        own = SharedExpert(*(_first(on.place(w)) for w in (alone.gate, alone.up, alone.down)))
        gate = Piece(on.place(normal(rng, rows, 3)), 1, 1)
        hidden = shared_hidden(x, norm, own)  # before any routed expert
    parts = [
        experts_apart(
            x, norm, bank, routing, on.place(np.where(of_wave == wave, table, -1).astype(np.int32))
        )
        for wave in range(waves)
        if (of_wave[chosen] == wave).any()
    ]
    apart = sum(parts[1:], parts[0])
    whole = feed_forward(x, norm, bank, routing, on.place(table), own, gate)
    assert same_bits(fetch(combine(x, apart, routing, own, hidden, gate)), fetch(whole))


def _first(weight):
    """The first matrix of a stack."""
    return weight._each(lambda array: array[0])


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
    y = apart(backend, x, bank, slots)

    def total(some):
        routing = Routing(None, on.place(weights[some]))
        return fetch(combine(on.place(x[some]), on.place(y[some]), routing))

    order = rng.permutation(rows)[: rng.integers(1, rows + 1)]
    assert same_bits(apart(backend, x[order], bank, slots[order]), y[order])
    assert same_bits(total(order), total(np.arange(rows))[order])
    for row in order[:3]:
        for column in range(top_k):
            alone = apart(backend, x[row : row + 1], bank, slots[row : row + 1, [column]])
            assert same_bits(alone[0, 0], y[row, column])

    moved = rng.permutation(8)  # slot s holds what slot moved[s] held
    back = np.argsort(moved).astype(np.int32)
    again = ExpertWeights(*(_move(w, moved) for w in (bank.gate, bank.up, bank.down)))
    assert same_bits(apart(backend, x, again, back[slots]), y)


def _move(weight, order):
    return weight._each(lambda array: mx.array(np.array(array)[order]))
