"""Walk a verified tree: the longest path that the target itself would have taken."""

from collections.abc import Sequence

import numpy as np

from specdec.tree.draft_tree import DraftTree


def walk(tree: DraftTree, chosen: Sequence[int] | np.ndarray) -> tuple[tuple[int, ...], int]:
    """Follow the target's choices from the root as long as the tree holds them.

    chosen: [rows], the token the target chooses after each row, greedily or by sampling.
    Returns the accepted rows, the root first, and the bonus token: the choice after the last of
    them, which the target has not run on yet.
    """
    assert len(chosen) == tree.rows
    path, bonus = [0], int(chosen[0])
    # A child stands below its parent and siblings differ, so one pass down the rows is enough.
    for row in range(1, tree.rows):
        if tree.parents[row] == path[-1] and tree.tokens[row] == bonus:
            path.append(row)
            bonus = int(chosen[row])
    return tuple(path), bonus
