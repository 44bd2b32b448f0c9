"""The greedy walk down a verified tree without the host, for what a draft is asked next."""

import mlx.core as mx

from specdec.kernels.executor import operation


@operation()
def walked(
    verdict: mx.array, tree: mx.array, numbers: mx.array, layers: int, block: int
) -> mx.array:
    """The numbers of a draft's pass (specdec.draft.graph) with the walk's path for told rows.

    verdict: int32 [rows, 2], as kernels.top_tokens; tree: int32, tokens of all rows, then their
    parents; numbers: int32, its last are those of a pass of which nothing was told: the places seen
    are counted on from it, and where the first would be none it is below 0.
    """
    rows = verdict.shape[0]
    tokens, parents = tree[:rows], tree[rows : 2 * rows]
    numbers = numbers[-(1 + layers + 2 * block + 4 * block * layers) :]
    last, length, bonus = mx.array(0), mx.array(1), verdict[0, 0]
    path = mx.zeros(max(block, rows), mx.int32)
    for row in range(1, rows):
        taken = (parents[row] == last) & (tokens[row] == bonus)
        path = mx.where((mx.arange(len(path)) == length) & taken, row, path)
        last, bonus = mx.where(taken, row, last), mx.where(taken, verdict[row, 0], bonus)
        length = length + taken.astype(mx.int32)
    places, at = numbers[1 : 1 + layers], 1 + layers + block
    seen = numbers[at + block :].reshape(-1, 4)
    moved = mx.concatenate([mx.maximum(seen[:, :3] + length, 0), seen[:, 3:]], axis=1)
    ids = mx.concatenate([bonus[None], numbers[at + 1 : at + block]])
    parts = [length[None], places, path[:block], ids, moved.reshape(-1)]
    return mx.concatenate([part.astype(mx.int32) for part in parts])
