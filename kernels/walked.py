"""The greedy walk down a verified tree without the host, for what a draft is asked next."""

import mlx.core as mx
import numpy as np

from specdec.kernels.executor import operation

CAME = 36
"""What came of a round, int32: how many rows its path has, its rows from 1 on, the bonus token at
BONUS, the committed length afterwards at LENGTH, 0 up to CAME. Behind it, of a round that was
walked, the verdict [2 * rows], and the tree: one array tells the host all of it."""
BONUS, LENGTH = 33, 34


def came_before(bonus: int, length: int) -> np.ndarray:
    """The numbers of a round that is known and committed: a path without rows."""
    came = np.zeros(CAME, np.int32)
    came[BONUS], came[LENGTH] = bonus, length
    return came


@operation()
def walked(
    verdict: mx.array, tree: mx.array, numbers: mx.array, layers: int, block: int
) -> tuple[mx.array, mx.array]:
    """The numbers of a draft's pass (specdec.draft.graph) with the walk's path for told rows, and
    what came of the round, as CAME says.

    verdict: int32 [rows, 2], as kernels.top_tokens; tree: int32, tokens of all rows, then their
    parents; numbers: int32, its last are those of a pass of which nothing was told, and the
    committed length before the walk: the places seen are counted on from it, and where the first
    would be none it is below 0.
    """
    rows = verdict.shape[0]
    tokens, parents, before = tree[:rows], tree[rows : 2 * rows], numbers[-1]
    numbers = numbers[-(2 + layers + 2 * block + 4 * block * layers) : -1]
    last, length, bonus = mx.array(0), mx.array(1), verdict[0, 0]
    path = mx.zeros(max(block, BONUS - 1), mx.int32)
    for row in range(1, rows):
        taken = (parents[row] == last) & (tokens[row] == bonus)
        path = mx.where((mx.arange(len(path)) == length) & taken, row, path)
        last, bonus = mx.where(taken, row, last), mx.where(taken, verdict[row, 0], bonus)
        length = length + taken.astype(mx.int32)
    came = [length[None], path[: BONUS - 1], bonus[None], (before + length)[None], mx.zeros(1)]
    came += [verdict.reshape(-1), tree]
    places, at = numbers[1 : 1 + layers], 1 + layers + block
    seen = numbers[at + block :].reshape(-1, 4)
    moved = mx.concatenate([mx.maximum(seen[:, :3] + length, 0), seen[:, 3:]], axis=1)
    ids = mx.concatenate([bonus[None], numbers[at + 1 : at + block]])
    parts = [length[None], places, path[:block], ids, moved.reshape(-1)]
    told, after = (
        mx.concatenate([part.astype(mx.int32) for part in all_of]) for all_of in (parts, came)
    )
    return told, after
