"""Intervals against scipy's own where clusters are single draws, and by how often they hold."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from specdec import intervals
from specdec.intervals import Clusters, Estimate

VALUES = [2.0, 3.5, 1.0, 4.0, 2.5, 3.0, 5.0]


def ends(one: Estimate) -> tuple[float, float]:
    """Both ends of an interval that must be there."""
    assert one.low is not None
    assert one.high is not None
    return one.low, one.high


def wide(one: Estimate) -> float:
    low, high = ends(one)
    return high - low


def by_prompt(values):
    """Clusters of prompts of one round each."""
    return Clusters.of([[(value, 1)] for value in values])


def test_over_prompts_the_mean_is_students():
    found = intervals.per_prompt(by_prompt(VALUES))
    low, high = stats.ttest_1samp(VALUES, 0).confidence_interval(0.95)
    assert (found.value, found.unit, found.count) == (np.mean(VALUES), "prompts", 7)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    # With equal weights the ratio of totals is the same figure.
    assert intervals.pooled(by_prompt(VALUES)) == found


def test_prompts_weigh_the_same_or_by_their_rounds():
    clusters = Clusters.of([[(1, 1)] * 9, [(4, 1)], *[[(1, 1)]] * 4])
    assert intervals.per_prompt(clusters).value == pytest.approx((1 * 5 + 4) / 6)
    assert intervals.pooled(clusters).value == pytest.approx((13 + 4) / 14)


@pytest.mark.parametrize("hits", [0, 1, 7, 12])
def test_a_share_of_single_draws_is_clopper_and_pearsons_or_wider(hits):
    draws = [[(at < hits, 1)] for at in range(12)]
    found = intervals.share(Clusters.of(draws))
    exact = stats.binomtest(hits, 12).proportion_ci(method="exact")
    assert found.value == hits / 12
    low, high = ends(found)
    if hits in (0, 12):
        assert (low, high) == (pytest.approx(exact.low), pytest.approx(exact.high))
    else:
        assert low <= exact.low + 1e-9
        assert high >= exact.high - 1e-9
        assert high - low < 1.25 * (exact.high - exact.low)


def test_correlated_draws_are_worth_less():
    """The same shares, once scattered over the prompts and once in whole prompts."""
    scattered = Clusters.of([[(at % 2, 1) for at in range(20)] for _ in range(10)])
    lumped = Clusters.of([[(prompt % 2, 1)] * 20 for prompt in range(10)])
    apart, together = intervals.share(scattered), intervals.share(lumped)
    assert apart.value == together.value == 0.5
    assert wide(together) > 3 * wide(apart)


@pytest.mark.parametrize("count", [6, 9, 24, 61])
def test_the_interval_of_a_median_is_the_sign_tests(count):
    values = np.random.default_rng(count).normal(size=count)
    found = intervals.median(values.tolist())
    test = stats.quantile_test(values, q=np.median(values), p=0.5)
    expected = test.confidence_interval(0.95)
    assert ends(found) == (expected.low, expected.high)


def test_too_little_has_no_interval():
    assert intervals.median([1, 2, 3, 4, 5]) == Estimate(3, None, None, "prompts", 5)
    assert intervals.median([]) == intervals.NOTHING
    assert intervals.per_prompt(Clusters.of([])).value is None
    assert intervals.share(Clusters.of([[(1, 1)]])).low is None
    assert intervals.pooled(Clusters.of([[(3, 1)]])) == Estimate(3, None, None, "blocks", 1)
    assert intervals.paired(1.5, [[(3, 2)]]) == Estimate(1.5, None, None, "blocks", 1)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), max_size=40), max_size=9))
def test_clusters_keep_every_round(prompts):
    clusters = Clusters.of([[(value, 1) for value in rounds] for rounds in prompts])
    there = [rounds for rounds in prompts if rounds]
    assert sum(top for top, _ in clusters.sums) == sum(map(sum, there))
    assert sum(bottom for _, bottom in clusters.sums) == sum(map(len, there))
    assert clusters.unit == ("prompts" if len(there) >= intervals.PROMPTS else "blocks")
    if clusters.unit == "blocks":
        assert sorted(set(clusters.prompts)) == list(range(len(there)))
        sizes = [bottom for _, bottom in clusters.sums]
        assert all(size >= 2 for size in sizes) or any(len(rounds) == 1 for rounds in there)
    found = intervals.per_prompt(clusters)
    if there:
        assert found.value == pytest.approx(np.mean([np.mean(rounds) for rounds in there]))
    if found.value is not None and found.low is not None:
        low, high = ends(found)
        assert low <= found.value <= high


def walk(rng, rounds, keep):
    """Lengths of rounds in stretches that are easy or hard to draft: a chain of two states."""
    state, done = rng.random() < 0.5, []
    for _ in range(rounds):
        state = state if rng.random() < keep else not state
        done.append(1 + rng.binomial(4, 0.8 if state else 0.2))
    return done


@pytest.mark.parametrize(("prompts", "least"), [(1, 0.85), (3, 0.85), (12, 0.91)])
def test_intervals_hold_as_often_as_they_say(prompts, least):
    """On rounds that are correlated within their prompt; taken one by one they hold far less."""
    rng, truth, held, naive = np.random.default_rng(prompts), 1 + 4 * 0.5, 0, 0
    for _ in range(300):
        drawn = [walk(rng, 80, 0.85) for _ in range(prompts)]
        found = intervals.per_prompt(Clusters.of([[(v, 1) for v in one] for one in drawn]))
        low, high = ends(found)
        held += low <= truth <= high
        single = stats.ttest_1samp(np.concatenate(drawn), 0).confidence_interval(0.95)
        naive += single.low <= truth <= single.high
    assert held / 300 >= least
    assert naive < held
    assert naive / 300 < 0.8


def test_pairs_cancel_what_both_runs_share():
    """A machine that slows down alike for both says nothing about their ratio."""
    rng = np.random.default_rng(3)
    pace = rng.uniform(1, 5, 10)
    found = intervals.paired(2.0, [[(2 * t * rng.uniform(0.98, 1.02), t) for t in pace]])
    low, high = ends(found)
    assert 1.95 < low < 2.0 < high < 2.05
    assert math.log(high / 2) == pytest.approx(math.log(2 / low))
    apart = intervals.paired(2.0, [list(zip(2 * pace, rng.permutation(pace), strict=True))])
    assert wide(apart) > 10 * wide(found)


def test_told():
    assert intervals.told(Estimate(1.305, 1.2, 1.41)) == "1.30 (1.20 to 1.41)"
    assert intervals.told(Estimate(0.25), 1, 100) == "25.0"
    assert intervals.told(intervals.NOTHING) == "-"
