"""Trees from blocks: optimal, prefix-closed, in the official order, within the budget."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.tree.block import Block
from specdec.tree.build import KINDS, build
from specdec.tree.draft_tree import DraftTree
from tests.trees import blocks, path_to


def all_paths(block: Block) -> list[tuple[float, tuple[int, ...]]]:
    """Every path of a block as (-weight, ranks), in the official order."""
    paths = []
    for depth in range(1, block.slots + 1):
        for ranks in product(range(block.width), repeat=depth):
            weight = 0.0
            for slot, rank in enumerate(ranks):
                weight += float(block.log_probs[slot, rank])
            paths.append((-weight, ranks))
    return sorted(paths)


def ranks_of(tree: DraftTree, block: Block) -> list[tuple[int, ...]]:
    """The rank tuple of every node, in row order, found from tokens alone."""
    found = []
    for row in range(1, tree.rows):
        path = path_to(tree.parents, row)[1:]
        found.append(
            tuple(
                int(np.flatnonzero(block.tokens[slot] == tree.tokens[node])[0])
                for slot, node in enumerate(path)
            )
        )
    return found


@settings(deadline=None)
@given(blocks(), st.integers(0, 40))
def test_best_first_takes_the_heaviest_paths_in_the_official_order(block, budget):
    tree = build(7, block, budget)
    expected = all_paths(block)[:budget]
    assert ranks_of(tree, block) == [ranks for _, ranks in expected]
    np.testing.assert_array_equal(tree.log_weights[1:], [-weight for weight, _ in expected])


@settings(deadline=None)
@given(blocks(), st.integers(0, 40), st.sampled_from(KINDS))
def test_every_kind_gives_a_tree_within_the_budget(block, budget, kind):
    tree = build(7, block, budget, kind)
    ranks = ranks_of(tree, block)
    paths = sum(block.width**depth for depth in range(1, block.slots + 1))
    available = block.slots if kind == "chain" else paths
    assert tree.rows - 1 == min(budget, available)
    assert tree.tokens[0] == 7
    assert (tree.tokens.dtype, tree.parents.dtype) == (np.int32, np.int32)
    assert tree.log_weights.dtype == np.float64
    # prefix-closed, each node once, children below their parents
    assert len(set(ranks)) == len(ranks)
    for row in range(1, tree.rows):
        parent = int(tree.parents[row])
        assert 0 <= parent < row
        assert ranks[row - 1][:-1] == (() if parent == 0 else ranks[parent - 1])
        # summed down the path: the same bits in every tree
        slot, rank = len(ranks[row - 1]) - 1, ranks[row - 1][-1]
        weight = tree.log_weights[parent] + block.log_probs[slot, rank]
        assert tree.log_weights[row] == weight


@settings(deadline=None)
@given(blocks(max_slots=3, max_width=3), st.integers(1, 6))
def test_no_other_tree_of_that_size_expects_more_accepted_tokens(block, budget):
    """Against brute force over every prefix-closed set of nodes."""
    weights = {ranks: np.exp(-weight) for weight, ranks in all_paths(block)}

    def best(taken: frozenset, value: float, seen: dict) -> float:
        if taken in seen:
            return 0.0
        seen[taken] = True
        if len(taken) == min(budget, len(weights)):
            return value
        found = 0.0
        for ranks in weights:
            if ranks not in taken and (len(ranks) == 1 or ranks[:-1] in taken):
                # siblings in order of rank: a heavier sibling never makes a set worse
                if ranks[-1] and (*ranks[:-1], ranks[-1] - 1) not in taken:
                    continue
                found = max(found, best(taken | {ranks}, value + weights[ranks], seen))
        return found

    tree = build(0, block, budget)
    expected = best(frozenset(), 0.0, {})
    assert float(np.exp(tree.log_weights[1:]).sum()) == pytest.approx(expected, rel=1e-12)


@given(blocks(), st.integers(0, 10))
def test_chain_is_the_top_token_of_each_slot(block, budget):
    tree = build(3, block, budget, "chain")
    nodes = min(budget, block.slots)
    assert tree.tokens[1:].tolist() == block.tokens[:nodes, 0].tolist()
    assert tree.parents.tolist() == list(range(-1, nodes))


@settings(deadline=None)
@given(blocks(), st.integers(0, 40))
def test_spine_is_the_chain_and_then_the_best_of_the_rest(block, budget):
    tree = build(3, block, budget, "spine")
    chain = [(0,) * depth for depth in range(1, min(budget, block.slots) + 1)]
    # Best-first around the spine: whatever is heaviest and hangs on what is there already.
    expected, taken = list(chain), set(chain)
    rest = [ranks for _, ranks in all_paths(block) if ranks not in taken]
    while len(expected) < budget and rest:
        ranks = next(
            ranks
            for ranks in rest
            if (len(ranks) == 1 or ranks[:-1] in taken)
            and (not ranks[-1] or (*ranks[:-1], ranks[-1] - 1) in taken)
        )
        rest.remove(ranks)
        taken.add(ranks)
        expected.append(ranks)
    assert ranks_of(tree, block) == expected


@settings(deadline=None)
@given(blocks(), st.integers(1, 20))
def test_a_larger_budget_keeps_the_smaller_tree(block, budget):
    small, large = build(1, block, budget), build(1, block, budget + 5)
    for field in ("tokens", "parents", "log_weights"):
        np.testing.assert_array_equal(getattr(large, field)[: small.rows], getattr(small, field))


@settings(deadline=None)
@given(blocks(max_width=8), st.integers(1, 8))
def test_width_of_the_budget_loses_nothing(block, budget):
    narrow = Block(block.tokens[:, :budget], block.log_probs[:, :budget])
    for kind in KINDS:
        wide = build(1, block, budget, kind)
        np.testing.assert_array_equal(build(1, narrow, budget, kind).tokens, wide.tokens)


def test_ties_shallower_and_lower_rank_first():
    """All paths certain or equally likely: the order is that of the rank tuples."""
    block = Block(np.array([[1, 2], [3, 4]], np.int32), np.zeros((2, 2)))
    ranks = ranks_of(build(0, block, 6), block)
    assert ranks == [(0,), (0, 0), (0, 1), (1,), (1, 0), (1, 1)]


def test_refusals():
    block = Block(np.array([[1]], np.int32), np.zeros((1, 1)))
    with pytest.raises(ValueError, match="best-first"):
        build(0, block, 3, "widest")
    with pytest.raises(ValueError, match="budget"):
        build(0, block, -1)


@pytest.mark.parametrize(
    ("tokens", "log_probs"),
    [
        ([[1, 2]], [[-1.0, -0.5]]),  # not sorted
        ([[1, 2]], [[0.1, 0.0]]),  # no probability
        ([[1, 2]], [[-0.1, np.nan]]),
        ([[2, 2]], [[-0.1, -0.2]]),  # one token twice
        ([[1, 2]], [[-0.1]]),
    ],
)
def test_a_block_asserts_what_the_builder_relies_on(tokens, log_probs):
    with pytest.raises(AssertionError):
        Block(np.array(tokens, np.int32), np.array(log_probs))
