"""Calibrated weights against processes that are known."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.calibration import SIDE, TOP, Calibration, Edges
from specdec.tree.build import KINDS, build
from specdec.tree.draft_tree import DraftTree
from tests.trees import blocks, path_to
from tests.worlds import World, linear


class All:
    """Everything is verified, and learned from."""

    def __init__(self) -> None:
        self.calibration = Calibration()

    def limit(self) -> int:
        return 12

    def stays_plain(self) -> bool:
        return False

    def cut(self, tree):
        self.edges = Edges.of(tree)
        return tree

    def learn(self, done) -> None:
        self.calibration.learn(self.edges, done.tree.rows, done.path)


@pytest.mark.parametrize("top", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("side", [0.2, 0.6, 1.0])
def test_factors_are_those_of_the_process(top, side):
    budget = All()
    world = World(linear(1, 0), 0, confidence=0.6, top=top, side=side, seed=1)
    world.play(budget, 4000)
    assert budget.calibration.top(1) == pytest.approx(top, abs=0.12)
    assert budget.calibration.top(2) == pytest.approx(top, abs=0.15)
    assert budget.calibration.side == pytest.approx(side, abs=0.25)


def test_weights_foretell_the_accepted_tokens():
    """Their sum is the mean acceptance length, which the draft's own weights overstate."""
    budget = All()
    world = World(linear(1, 0), 0, confidence=0.7, top=0.8, side=0.3, seed=2)
    world.play(budget, 3000)
    raw, calibrated, accepted = [], [], []
    for _ in range(400):
        done = world.step(budget)
        raw.append(np.exp(done.tree.log_weights[1:]).sum())
        calibrated.append(sum(budget.calibration.weights(Edges.of(done.tree))[1:]))
        accepted.append(done.accepted)
    assert np.mean(calibrated) == pytest.approx(np.mean(accepted), rel=0.12)
    assert np.mean(raw) > 1.3 * np.mean(accepted)


def test_a_draft_too_sure_deep_down():
    """Each depth has its own factor."""
    log_weights = np.log(0.9) * np.arange(4)
    tree = DraftTree(np.arange(4, dtype=np.int32), np.arange(-1, 3, dtype=np.int32), log_weights)
    calibration, edges = Calibration(), Edges.of(tree)
    rng = np.random.default_rng(0)
    for _ in range(2000):
        depth = next((at for at, p in enumerate((0.9, 0.6, 0.2)) if rng.random() > p), 3)
        calibration.learn(edges, 4, tuple(range(depth + 1)))
    weights = calibration.weights(edges)
    given_parent = np.array(weights[1:]) / weights[:-1]
    np.testing.assert_allclose(given_parent, [0.9, 0.6, 0.2], atol=0.12)


def test_before_anything_is_known():
    calibration = Calibration()
    assert calibration.top(1) == calibration.top(7) == TOP
    assert calibration.side == SIDE


@given(block=blocks(), budget=st.integers(0, 24), kind=st.sampled_from(KINDS))
def test_edges_and_weights_of_any_tree(block, budget, kind):
    """Against the definition, row by row; also where the draft gave no probability at all."""
    tree = build(0, block, budget, kind)
    edges = Edges.of(tree)
    assert edges.parents == tree.parents.tolist()
    assert edges.depths == tree.depths.tolist()
    firsts: dict[int, int] = {}
    for row in range(1, tree.rows):
        firsts.setdefault(int(tree.parents[row]), row)
    for row in range(tree.rows):
        path = path_to(tree.parents, row)
        assert edges.spine[row] == all(firsts[above] == below for above, below in pairwise(path))
    calibration = Calibration()
    calibration.learn(edges, tree.rows, (0,))
    weights = calibration.weights(edges)
    assert weights[0] == 1.0
    for row in range(1, tree.rows):
        assert 0.0 <= weights[row] <= weights[tree.parents[row]]
