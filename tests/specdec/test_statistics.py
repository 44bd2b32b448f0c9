"""Statistics of drafts against rounds counted by hand, and against draws whose truth is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import statistics
from specdec.round import PhaseSeconds, Round
from specdec.tree.draft_tree import DraftTree


def bushy(path, weights=(0.0, -0.5, -1.0, -0.7, -2.0), verify=0.1):
    """Root 0 with children 1 and 2; 3 and 4 below 1. `path`: the accepted rows."""
    tree = DraftTree(
        np.array([10, 11, 12, 13, 14], np.int32),
        np.array([-1, 0, 0, 1, 1], np.int32),
        np.array(weights),
    )
    return Round(tree, tuple(path), 99, PhaseSeconds(verify=verify))


def plain():
    return Round(DraftTree.root(5), (0,), 6, PhaseSeconds(verify=0.05))


ROUNDS = [[bushy([0, 1, 4]), bushy([0, 2]), bushy([0]), bushy([0, 1])]]


def test_lengths_counted_by_hand():
    assert statistics.length(ROUNDS).value == pytest.approx((3 + 2 + 1 + 2) / 4)
    assert [(one.length, one.rounds, one.share) for one in statistics.lengths(ROUNDS)] == [
        (1, 1, 0.25),
        (2, 2, 0.5),
        (3, 1, 0.25),
    ]
    assert statistics.lengths([]) == ()


def test_depths_counted_by_hand():
    first, second = statistics.depths(ROUNDS)
    assert (first.depth, first.reached.value, first.visits, first.rate.value) == (1, 0.75, 4, 0.75)
    # Three rounds accepted depth 1, but the one that took row 2 had drafted nothing below it.
    assert (second.depth, second.reached.value, second.visits) == (2, 0.25, 2)
    assert second.rate.value == 0.5


def test_ranks_counted_by_hand():
    # Visits of nodes with children: four roots and row 1 twice.
    first, second = statistics.ranks(ROUNDS)
    assert (first.rank, first.visits, first.rate.value) == (0, 6, pytest.approx(2 / 6))
    assert (second.rank, second.visits, second.rate.value) == (1, 6, pytest.approx(2 / 6))
    assert (first.share, second.share) == (0.5, 0.5)


def test_siblings_are_ranked_by_weight_not_by_row():
    swapped = bushy([0, 1], weights=(0.0, -1.0, -0.5, -2.0, -2.5))
    first, second = statistics.ranks([[swapped, swapped]])
    assert (first.rate.value, second.rate.value) == (0.0, 0.5)


def test_calibration_counted_by_hand():
    done = statistics.calibration([[bushy([0, 1], weights=np.log([1, 0.72, 0.18, 0.78, 0.15]))]])
    assert [(one.low, one.nodes, one.accepted.value) for one in done.bins] == [
        (0.1, 2, 0.0),
        (0.7, 2, 0.5),
    ]
    assert [one.predicted for one in done.bins] == pytest.approx([0.165, 0.75])
    assert done.error == pytest.approx((2 * 0.165 + 2 * 0.25) / 4)
    assert done.bias == pytest.approx((0.72 + 0.18 + 0.78 + 0.15 - 1) / 4)


def test_a_path_of_no_probability_lies_in_the_first_bin():
    done = statistics.calibration([[bushy([0], weights=(0, -1, -1, -np.inf, -np.inf))]])
    assert (done.bins[0].low, done.bins[0].nodes, done.bins[0].predicted) == (0.0, 2, 0.0)


def drawn(rng, sure):
    """A round of one drafted node that says p and is right with p ** sure."""
    p = rng.uniform(0.05, 1)
    tree = DraftTree(np.array([1, 2], np.int32), np.array([-1, 0], np.int32), np.log([1, p]))
    return Round(tree, (0, 1) if rng.random() < p**sure else (0,), 3, PhaseSeconds())


@pytest.mark.parametrize(
    ("sure", "error", "bias"), [(1, 0, 0), (2, 0.16, 0.16), (0.5, 0.15, -0.15)]
)
def test_calibration_finds_drafts_that_are_too_sure_or_not_sure_enough(sure, error, bias):
    rng = np.random.default_rng(7)
    done = statistics.calibration([[drawn(rng, sure) for _ in range(400)] for _ in range(8)])
    assert done.error == pytest.approx(error, abs=0.035)
    assert done.bias == pytest.approx(bias, abs=0.03)
    inside = []
    for one in done.bins:
        low, high = one.accepted.low, one.accepted.high
        assert low is not None
        assert high is not None
        inside.append(low <= one.predicted <= high)
    assert (sum(inside) >= len(inside) - 1) == (sure == 1)


def test_budgets_and_costs():
    rounds = [[plain(), bushy([0]), bushy([0], verify=0.3)], [bushy([0], verify=0.2)]]
    nodes = [(one.nodes, one.rounds, one.share) for one in statistics.chosen(rounds)]
    assert nodes == [(0, 1, 0.25), (4, 3, 0.75)]
    costs = [
        (one.rows, one.rounds, one.median, one.low, one.high) for one in statistics.costs(rounds)
    ]
    assert costs == [
        (1, 1, 50, 50, 50),
        (5, 3, pytest.approx(200), pytest.approx(150), pytest.approx(250)),
    ]


def test_plain_decoding_has_lengths_and_nothing_else():
    rounds = [[plain()] * 4]
    assert statistics.length(rounds).value == 1
    assert statistics.depths(rounds) == statistics.ranks(rounds) == ()
    assert statistics.calibration(rounds) == statistics.Calibration((), None, None)


def test_counts_per_round_are_never_below_nothing():
    rounds = [plain()] * 9 + [bushy([0])]
    found = statistics.per_round([[rounds]], lambda one: one.tree.rows - 1)
    assert found.value == pytest.approx(0.4)
    assert found.low == 0


@pytest.mark.parametrize("many", [1, 2, 7], ids="{} prompts".format)
def test_repeats_make_no_count_surer(many):
    """A repeat that asks for the same experts tells nothing new, however few prompts there are."""
    rounds = [plain(), plain(), bushy([0])] * 5
    prompts = [rounds[at:] for at in range(many)]

    def counted(repeats):
        runs = [[one] * repeats for one in prompts]
        return statistics.per_round(runs, lambda one: one.tree.rows)

    once, thrice = counted(1), counted(3)
    assert (thrice.unit, thrice.count) == (once.unit, once.count)
    for name in ("value", "low", "high"):
        assert getattr(thrice, name) == pytest.approx(getattr(once, name))
    assert once.low < once.value < once.high


def test_a_repeat_that_was_cut_off_counts_as_far_as_it_came():
    found = statistics.per_round([[[plain(), bushy([0])], [plain()]]], lambda one: one.tree.rows)
    assert found.value == pytest.approx((1 + 5 + 1) / 3)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([[0], [0, 1], [0, 2], [0, 1, 3]]), max_size=12), max_size=8)
)
def test_the_figures_agree_with_each_other(paths):
    rounds = [[bushy(path) for path in prompt] for prompt in paths]
    every = [one for prompt in rounds for one in prompt]
    depths, ranks = statistics.depths(rounds), statistics.ranks(rounds)
    accepted = sum(one.accepted for one in every)
    assert sum(one.rounds for one in statistics.lengths(rounds)) == len(every)
    assert sum((one.reached.value or 0) for one in depths) * len(every) == pytest.approx(accepted)
    assert sum((one.rate.value or 0) * one.visits for one in ranks) == pytest.approx(accepted)
    bins = statistics.calibration(rounds).bins
    assert sum((one.accepted.value or 0) * one.nodes for one in bins) == pytest.approx(accepted)
    assert all(one.low <= one.predicted <= one.high for one in bins)
