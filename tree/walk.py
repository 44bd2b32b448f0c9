"""Walk a verified tree: the longest path that the target itself would have taken."""

from collections.abc import Callable

from specdec.tree.draft_tree import DraftTree


def walk(tree: DraftTree, choose: Callable[[int], int]) -> tuple[tuple[int, ...], int]:
    """Follow the target's choices from the root as long as the tree holds them.

    choose(row) -> the token the target chooses after the row, greedily or by sampling; asked once
    for every row of the path, in its order, and for no other.
    Returns the accepted rows, the root first, and the bonus token: the choice after the last of
    them, which the target has not run on yet.
    """
    path, bonus = [0], choose(0)
    # A child stands below its parent and siblings differ, so one pass down the rows is enough.
    for row in range(1, tree.rows):
        if tree.parents[row] == path[-1] and tree.tokens[row] == bonus:
            path.append(row)
            bonus = choose(row)
    return tuple(path), bonus
