"""The accepted path against a naive walk over children."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from specdec.tree.draft_tree import DraftTree
from specdec.tree.walk import walk
from tests.trees import path_to


@st.composite
def trees(draw):
    """Trees with few tokens, so that the same token stands in many places."""
    rows = draw(st.integers(1, 25))
    tokens, parents, taken = [draw(st.integers(0, 4))], [-1], set()
    for row in range(1, rows):
        token, parent = draw(st.integers(0, 4)), draw(st.integers(0, row - 1))
        parent = min(parent, len(tokens) - 1)
        if (parent, token) not in taken:  # siblings differ
            taken.add((parent, token))
            tokens.append(token)
            parents.append(parent)
    count = len(tokens)
    return DraftTree(np.array(tokens, np.int32), np.array(parents, np.int32), np.zeros(count))


def naive(tree, chosen):
    path = [0]
    while True:
        children = {
            int(tree.tokens[row]): row for row in range(tree.rows) if tree.parents[row] == path[-1]
        }
        token = int(chosen[path[-1]])
        if token not in children:
            return tuple(path), token
        path.append(children[token])


@given(trees(), st.data())
def test_walk_is_the_naive_walk(tree, data):
    chosen = data.draw(st.lists(st.integers(0, 4), min_size=tree.rows, max_size=tree.rows))
    asked: list[int] = []

    def choose(row):
        asked.append(row)
        return chosen[row]

    path, bonus = walk(tree, choose)
    assert (path, bonus) == naive(tree, chosen)
    assert asked == list(path)
    assert list(path) == path_to(tree.parents, path[-1])
    assert type(bonus) is int


def test_the_root_alone_gives_its_choice():
    assert walk(DraftTree.root(5), [9].__getitem__) == ((0,), 9)


def test_a_full_chain_is_accepted_with_a_bonus():
    tree = DraftTree(np.array([1, 2, 3], np.int32), np.array([-1, 0, 1], np.int32), np.zeros(3))
    assert walk(tree, [2, 3, 4].__getitem__) == ((0, 1, 2), 4)
    assert walk(tree, [3, 3, 4].__getitem__) == ((0,), 3)  # a right token under the wrong parent
