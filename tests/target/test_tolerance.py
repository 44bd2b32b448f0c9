"""Cache-aware routing: its rule against a naive one, its limits, and what it says it changed."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels.array import to_numpy
from specdec.kernels.linear import Piece
from specdec.kernels.routing import Routing, route
from specdec.target.tolerance import Tolerance, _union, substitute
from tests.backends import REFERENCE, each_backend


def naive(logits, chosen, inside, fraction):
    """The rule of the module's docstring, step by step in plain Python."""
    scores = [logits[e] for e in chosen]
    spread = max(scores) - min(scores)
    margin = fraction * spread if spread >= 1e-6 else fraction * (abs(max(scores)) + 1e-6)
    candidates = [
        e
        for e in range(len(logits))
        if inside[e] and e not in chosen and logits[e] >= min(scores) - margin
    ]
    candidates.sort(key=lambda e: (-logits[e], e))
    members = list(chosen)
    for weakest in sorted((e for e in chosen if not inside[e]), key=lambda e: (logits[e], -e)):
        if candidates and logits[candidates[0]] >= logits[weakest] - margin:
            members[members.index(weakest)] = candidates.pop(0)
    return sorted(members, key=lambda e: (-logits[e], e))


rows = st.integers(1, 5)
tolerances = st.sampled_from([0.01, 0.1, 0.5, 1.0, 3.0])


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), experts=st.integers(2, 24), fraction=tolerances)
def test_the_rule_is_the_naive_one(seed, experts, fraction):
    random = np.random.default_rng(seed)
    top_k = int(random.integers(1, experts + 1))
    logits = random.normal(size=experts).round(int(random.integers(0, 4)))  # with ties
    chosen = np.argsort(-logits, kind="stable")[:top_k]
    inside = random.random(experts) < random.random()
    taken, count = substitute(logits, chosen, inside, fraction)
    assert taken.tolist() == naive(logits, chosen.tolist(), inside, fraction)
    assert count == len(set(taken.tolist()) - set(chosen.tolist()))
    assert len(set(taken.tolist())) == top_k


def routed(backend, logits, top_k, normalize):
    values = backend.place(mx.array(logits.astype(np.float32)))
    return values, route(Piece(values, 0, values.shape[1]), top_k, normalize)


@each_backend
@pytest.mark.parametrize("normalize", [True, False])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), count=rows, fraction=tolerances, top_k=st.integers(1, 4))
def test_weights_and_counts(backend, normalize, seed, count, fraction, top_k):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(count, 12)).astype(np.float32)
    resident = np.flatnonzero(random.random(12) < 0.5)
    values, routing = routed(backend, logits, top_k, normalize)
    tolerance = Tolerance(fraction, normalize, backend)
    changed = tolerance(3, values, routing, resident)
    before, after = to_numpy(routing.experts), to_numpy(changed.experts)
    (one,) = tolerance.counts()
    assert (one.layer, one.rows, one.choices) == (3, count, count * top_k)
    new = [set(b.tolist()) - set(a.tolist()) for a, b in zip(before, after, strict=True)]
    assert one.substituted == sum(map(len, new))
    assert all(ids <= set(resident.tolist()) for ids in new)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    kl = 0.0
    for row in range(count):
        exact, taken = p[row, before[row]], p[row, after[row]]
        kl += math.log(exact.sum() / taken.sum())
        want = taken / taken.sum() if normalize else taken
        assert np.allclose(to_numpy(changed.weights)[row], want, rtol=1e-5)
        if not new[row]:  # untouched rows keep their bits
            assert np.array_equal(to_numpy(changed.weights)[row], to_numpy(routing.weights)[row])
            assert np.array_equal(before[row], after[row])
    assert one.kl == pytest.approx(kl, abs=1e-5)
    assert one.kl >= -1e-12
    assert to_numpy(changed.experts).dtype == np.int32
    assert to_numpy(changed.weights).dtype == np.float32


def test_nothing_changes_when_all_is_in_memory_or_nothing_is():
    values, routing = routed(REFERENCE, np.random.default_rng(0).normal(size=(4, 8)), 2, True)
    tolerance = Tolerance(5.0, True, REFERENCE)
    assert tolerance(0, values, routing, np.arange(8)) is routing
    assert tolerance(0, values, routing, np.arange(0)) is routing
    (one,) = tolerance.counts()
    assert (one.rows, one.substituted, one.kl) == (8, 0, 0.0)
    tolerance.reset()
    assert tolerance.counts() == ()


def test_top_1_has_a_margin_of_its_own():
    logits = np.array([2.0, 1.9, 0.0])
    inside = np.array([False, True, True])
    assert substitute(logits, np.array([0]), inside, 0.10)[0].tolist() == [1]  # 2 - 0.2 <= 1.9
    assert substitute(logits, np.array([0]), inside, 0.01)[0].tolist() == [0]


def test_the_best_candidate_is_taken_whatever_its_index():
    """Candidates are not cut off in the order of their ids."""
    logits = np.full(64, 0.9)
    logits[0], logits[63] = 1.0, 0.99
    inside = np.arange(64) != 0
    assert substitute(logits, np.array([0]), inside, 1.0)[0].tolist() == [63]


def test_a_nan_is_left_to_be_seen():
    logits = np.array([np.nan, 1.0, 0.9, 0.8])
    chosen = np.array([0, 1])
    assert substitute(logits, chosen, np.array([False, False, True, True]), 9.0)[1] == 0


def test_the_union_of_the_rows_is_told_anew():
    taken = np.array([[3, 1], [1, 7], *[[7, 3]] * 30], np.int32)
    union = _union(taken, 8)
    assert union[:3, 0].tolist() == [1, 3, 7]
    assert union[0, 1] == 0b11
    assert union[1].view(np.uint32)[1] == 0xFFFFFFFD
    assert union[2].view(np.uint32)[1] == 0xFFFFFFFE
    assert (union[3:] == [-1, 0]).all()
    values, routing = routed(REFERENCE, np.random.default_rng(1).normal(size=(2, 8)), 2, True)
    with_union = Routing(routing.experts, routing.weights, mx.zeros((4, 2), mx.int32))
    changed = Tolerance(9.0, True, REFERENCE)(0, values, with_union, np.array([5, 6]))
    assert changed.union.shape == (4, 2)
    used = {e for e in np.array(changed.union)[:, 0].tolist() if e >= 0}
    assert used == set(np.array(changed.experts).ravel().tolist())
