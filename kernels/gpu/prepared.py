"""Prepared: what the kernels read of a verify pass, made before the first of them is launched.

All that the host has to say of a tree goes to the device as one array: a kernel that reads what the
host wrote waits for it, and so does the host for memory that it writes into.
"""

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array
from specdec.kernels.attention import AttentionLayout
from specdec.kernels.gpu.attention import path_table, paths
from specdec.kernels.gpu.tree_program import place_of, program_numbers
from specdec.kernels.layout import LAYOUTS, TreeLayout


class Prepared(NamedTuple):
    """tokens int32 [rows]; depths int32 [rows], of the rows in their tree."""

    tokens: mx.array
    depths: mx.array


def prepare(layout: AttentionLayout, taps: int | None, tokens: Array) -> Prepared:
    """Put arrays beside the layout and its tree (on_device), all that kernels read of either.

    taps: of the convolution of gated delta layers, None without such layers. tokens: int32 [rows],
    of a lone root also on the device.
    """
    tree = layout.tree
    if tree.rows == 1:
        paths(layout)
        tokens = tokens if isinstance(tokens, mx.array) else mx.array(tokens)
        return Prepared(tokens, tokens)
    kept, columns = _numbers(tree, taps)
    rows, numbers = tree.rows, kept.copy()
    numbers[:rows] = tokens
    end = rows * (2 + columns)
    # positions, and the committed length
    numbers[2 * rows : end].reshape(rows, columns)[:, :2] += layout.length
    on_device = mx.array(numbers)
    layout.on_device["paths"] = on_device[2 * rows : end].reshape(rows, columns)
    if taps is not None:
        tree.on_device[place_of(taps)] = on_device[end:]
    return Prepared(on_device[:rows], on_device[rows : 2 * rows])


@lru_cache(maxsize=LAYOUTS)  # trees are compared by identity
def _numbers(tree: TreeLayout, taps: int | None) -> tuple[np.ndarray, int]:
    """Room for tokens, depths, paths behind no token and the program; columns of the paths."""
    table = path_table(AttentionLayout(tree, 0))
    program = program_numbers(tree, taps) if taps is not None else np.zeros(0, np.int32)
    parts = [tree.depths, tree.depths, table.ravel(), program]
    return np.concatenate(parts).astype(np.int32), table.shape[1]
