"""The curve of costs against curves that are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.cost_curve import CostCurve

SHAPE = [1 + 0.25 * rows for rows in range(17)]


def curve(noise=0.1, **options) -> CostCurve:
    return CostCurve(SHAPE, noise, **options)


def taught(true, rounds, rng, noise=0.05, hiccups=0.0, rows=(1, 2, 3, 5, 8, 13, 17)) -> CostCurve:
    """A curve that saw passes of some row counts; true(rows): their cost at context 0."""
    one = curve()
    for at in range(rounds):
        many = 1 if at < 3 else int(rng.choice(rows))
        cost = true(many) * np.exp(noise * rng.normal())
        one.add(many, 0, cost * (20 if rng.random() < hiccups else 1))
    return one


@given(
    steps=st.lists(st.floats(0.0, 0.8), min_size=16, max_size=16),
    scale=st.floats(1e-5, 10.0),
    hiccups=st.sampled_from([0.0, 0.03]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_seen_costs_are_those_that_were_seen(steps, scale, hiccups, seed):
    """Any non-decreasing costs, in any unit, a pass in thirty twenty times as slow."""
    true = scale * np.cumsum([1.0, *steps])
    rng = np.random.default_rng(seed)
    one = taught(lambda rows: true[rows - 1], 500, rng, hiccups=hiccups)
    costs = one.costs(0)
    for rows in (1, 2, 3, 5, 8, 13, 17):
        assert costs[rows - 1] == pytest.approx(true[rows - 1], rel=0.15)
    # And those between lie between.
    assert (np.diff(costs) >= 0).all()


def test_rows_that_were_not_seen_go_on_as_the_others():
    rng = np.random.default_rng(3)
    one = taught(lambda rows: 0.9 + 0.1 * rows, 300, rng, rows=(1, 2, 3, 4, 6))
    costs = one.costs(0)
    assert costs[4] == pytest.approx(1.4, rel=0.05)
    assert costs[16] == pytest.approx(2.6, rel=0.25)
    assert costs[16] - one.costs(0, optimism=1.0)[16] > 5 * (
        costs[3] - one.costs(0, optimism=1.0)[3]
    )


def test_one_observation_gives_a_whole_curve():
    one = curve()
    one.add(1, 0, 99.0)  # the first use compiles
    assert not one.known
    one.add(1, 0, 2.0)
    np.testing.assert_allclose(one.costs(0), 2.0 * np.array(SHAPE))


def test_a_machine_that_slows_down_slows_down_at_all_row_counts():
    rng = np.random.default_rng(4)
    one = taught(lambda rows: 1 + 0.3 * (rows - 1), 300, rng)
    for _ in range(80):
        one.add(3, 0, 2 * 1.6)
    assert one.costs(0)[[0, 7, 16]] == pytest.approx([2.0, 6.2, 11.6], rel=0.15)


def test_context_costs_are_learned_and_foretold():
    """0.2 per thousand tokens, and 0.02 for each row: also for a context never seen."""
    rng = np.random.default_rng(5)
    one = curve()
    for at in range(600):
        rows, context = (1 if at < 3 else int(rng.choice([1, 3, 5, 9]))), int(rng.integers(4000))
        true = 1 + 0.1 * (rows - 1) + context / 1000 * (0.2 + 0.02 * rows)
        one.add(rows, context, true * np.exp(0.03 * rng.normal()))
    for context in (0, 2000, 8000):
        for rows in (1, 9):
            true = 1 + 0.1 * (rows - 1) + context / 1000 * (0.2 + 0.02 * rows)
            assert one.costs(context)[rows - 1] == pytest.approx(true, rel=0.12)
        assert one.one_row(context) == pytest.approx(one.costs(context)[0])


def test_the_time_of_a_miss_is_learned():
    """Passes of one row count that miss more take longer: 0.01 a miss, beside rows and context."""
    rng = np.random.default_rng(7)
    one = curve()
    for at in range(400):
        rows = 1 if at < 3 else int(rng.choice([1, 3, 5]))
        misses = int(rng.integers(0, 40 * rows))
        true = 1 + 0.1 * (rows - 1) + 0.01 * misses
        one.add(rows, 0, true * np.exp(0.03 * rng.normal()), misses)
    for misses in (0, 30, 150):
        expected = [1 + 0.1 * rows + 0.01 * misses for rows in (0, 2, 4)]
        found = one.costs(0, np.full(17, misses))[[0, 2, 4]]
        np.testing.assert_allclose(found, expected, rtol=0.1)
        assert one.one_row(0, misses) == pytest.approx(found[0])


def test_a_slow_pass_counts_for_little():
    rng = np.random.default_rng(6)
    one = taught(lambda rows: 1 + 0.3 * (rows - 1), 300, rng)
    before = one.costs(0)
    one.add(5, 0, 2.2 * 1000)
    np.testing.assert_allclose(one.costs(0), before, rtol=0.25)


@pytest.mark.parametrize("each", [True, False])
def test_first_uses_that_compile_are_not_believed(each):
    one = curve(compiled_each=each)
    for cost in (50.0, 1.0, 1.0, 1.0):
        one.add(1, 0, cost)
    one.add(5, 0, 50.0)
    assert one.costs(0)[4] < 3
    before = one.costs(0)[8]
    one.add(9, 0, 50.0)
    changed = abs(one.costs(0)[8] / before - 1) > 0.3
    assert changed is not each  # without kernels of its own, nine rows compile nothing
    one.add(9, 0, 50.0)
    assert one.costs(0)[8] > 1.3 * before


@given(
    seen=st.lists(
        st.tuples(
            st.integers(1, 17), st.integers(0, 100_000), st.floats(0, 1e6, allow_subnormal=False)
        ),
        max_size=40,
    )
)
@settings(deadline=None)
def test_no_clock_breaks_it(seen):
    """Zero, absurd, contradicting times: costs stay finite, not negative, and do not fall."""
    one = curve()
    for rows, context, cost in seen:
        one.add(rows, context, cost)
    if one.known:
        for context in (0, 1000, 100_000):
            costs = one.costs(context, optimism=1.0)
            assert np.isfinite(costs).all()
            assert (costs >= 0).all()
            assert (np.diff(costs) >= 0).all()
