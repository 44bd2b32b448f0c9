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
    """tokens int32 [rows]; turn: cos and sin of the rows' positions, float32 [rows, half] each;
    program: what was put beside the tree, which may hold more: trees of one shape share it."""

    tokens: mx.array
    turn: tuple[mx.array, mx.array]
    program: dict[str, mx.array]


def prepare(
    layout: AttentionLayout,
    taps: int | None,
    tokens: Array,
    turn: tuple[Array, Array],
) -> Prepared:
    """Put arrays beside the layout and its tree (on_device), all that kernels read of either.

    taps: of the convolution of gated delta layers, None without such layers. tokens: int32 [rows],
    of a lone root also on the device, turn: cos and sin of the rows, of a lone root on the device.
    """
    tree = layout.tree
    if tree.rows == 1:
        paths(layout)
        tokens = tokens if isinstance(tokens, mx.array) else mx.array(tokens)
        return Prepared(tokens, turn, {})
    kept, columns = _numbers(tree, taps)
    rows, shape = tree.rows, turn[0].shape
    numbers = np.concatenate([kept, *(part.ravel().view(np.int32) for part in turn)])
    numbers[:rows] = tokens
    end, half = rows * (1 + columns), turn[0].size
    # positions, and the committed length
    numbers[rows:end].reshape(rows, columns)[:, :2] += layout.length
    on_device = mx.array(numbers)
    layout.on_device["paths"] = on_device[rows:end].reshape(rows, columns)
    program = {}
    if taps is not None:
        program[place_of(taps)] = on_device[end : len(kept)]
        tree.on_device.update(program)
    turned = on_device[len(kept) :].view(mx.float32)
    return Prepared(
        on_device[:rows], (turned[:half].reshape(shape), turned[half:].reshape(shape)), program
    )


@lru_cache(maxsize=LAYOUTS)  # trees are compared by identity
def _numbers(tree: TreeLayout, taps: int | None) -> tuple[np.ndarray, int]:
    """Room for tokens, paths behind no token and the program; columns of the paths."""
    table = path_table(AttentionLayout(tree, 0))
    program = program_numbers(tree, taps) if taps is not None else np.zeros(0, np.int32)
    parts = [tree.depths, table.ravel(), program]
    return np.concatenate(parts).astype(np.int32), table.shape[1]
