"""TreeLayout against walking up the parents one by one."""

import importlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.kernels.layout import TreeLayout
from tests.backends import needs_numba
from tests.trees import path_to, trees


@given(trees())
def test_paths_and_depths(parents):
    layout = TreeLayout(parents)
    assert layout.rows == len(parents)
    assert layout.paths.shape == (len(parents), layout.depths.max() + 1)
    for row in range(len(parents)):
        path = path_to(parents, row)
        padding = layout.paths.shape[1] - len(path)
        assert layout.paths[row].tolist() == [*path, *[-1] * padding]
        assert layout.depths[row] == len(path) - 1


@given(trees())
def test_levels_hold_every_row_once_below_its_parent(parents):
    layout = TreeLayout(parents)
    above = np.array([-1])
    for depth, level in enumerate(layout.levels):
        assert (layout.depths[level.rows] == depth).all()
        kept = np.arange(len(above)) if level.parents is None else level.parents
        assert np.array_equal(above[kept], parents[level.rows])
        above = level.rows
    laid = np.concatenate([level.rows for level in layout.levels])
    assert sorted(laid) == list(range(layout.rows))
    order = layout.level_order
    back = np.arange(layout.rows) if order is None else np.array(order)
    assert np.array_equal(laid[back], np.arange(layout.rows))


@given(trees(), st.integers(2, 6))
def test_windows_hold_the_last_tokens_of_each_path(parents, taps):
    """Committed rows are 0 to taps - 2, the tree's row r is taps - 1 + r."""
    windows = TreeLayout(parents).windows(taps)
    for row in range(len(parents)):
        seen = [*range(taps - 1), *(taps - 1 + r for r in path_to(parents, row))]
        assert windows[row].tolist() == seen[-taps:]


@given(st.integers(1, 40))
def test_a_chain_is_a_tree_without_branches(rows):
    chain = TreeLayout.chain(rows)
    assert chain.is_chain
    assert chain.parents.tolist() == [-1, *range(rows - 1)]
    assert chain.depths.tolist() == list(range(rows))
    assert [path[path >= 0].tolist() for path in chain.paths] == [
        list(range(row + 1)) for row in range(rows)
    ]
    if rows > 1:
        branched = chain.parents.copy()
        branched[-1] = max(rows - 3, 0)
        assert TreeLayout(branched).is_chain == (rows == 2)


@pytest.mark.parametrize("parents", [[0], [-1, -1], [-1, 1], [-1, 0, 2], [-1, 2, 0], [-1, -2]])
def test_what_is_no_tree_is_refused(parents):
    with pytest.raises(AssertionError):
        TreeLayout(np.array(parents, np.int32))


def test_trees_of_one_shape_share_a_layout():
    parents = np.array([-1, 0, 0, 1])
    layout = TreeLayout.of(parents)
    assert TreeLayout.of(parents.astype(np.int32).copy()) is layout
    assert np.array_equal(layout.paths, TreeLayout(parents.astype(np.int32)).paths)
    assert TreeLayout.of(np.array([-1, 0, 1, 1])) is not layout
    with pytest.raises(AssertionError):
        TreeLayout.of(np.array([-1, 2, 0]))


@needs_numba
def test_numba_compiles_one_code_for_all_layouts():
    """Prompts make a chain, trees ask for a shared layout: a row's bits come from the same code."""
    typeof = importlib.import_module("numba").typeof
    shared, chain = TreeLayout.of(np.array([-1, 0, 0])), TreeLayout.chain(3)
    for name in ("parents", "paths", "depths"):
        assert typeof(getattr(shared, name)) == typeof(getattr(chain, name))
