"""Prepared: what the kernels read of a verify pass, made before the first of them is launched.

All that the host has to say of a tree goes to the device as one array: a kernel that reads what the
host wrote waits for it, and so does the host for memory that it writes into.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array
from specdec.kernels.attention import AttentionLayout
from specdec.kernels.gpu.attention import block_count, path_table, paths
from specdec.kernels.gpu.tree_program import place_of, program_numbers, tree_program


class Prepared(NamedTuple):
    """kind: what the launches follow from; passes of a kind are the same but for their arrays.
    tokens int32 [rows]; depths int32 [rows], of the rows in their tree."""

    kind: tuple[int, ...]
    tokens: mx.array
    depths: mx.array


def prepare(layout: AttentionLayout, taps: int | None, tokens: Array) -> Prepared:
    """Put arrays beside the layout and its tree (on_device), all that kernels read of either.

    taps: of the convolution of gated delta layers, None without such layers. tokens: int32 [rows],
    of a lone root also on the device.
    """
    tree = layout.tree
    kind = tree.rows, block_count(layout)
    if tree.rows == 1:
        paths(layout)
        tokens = tokens if isinstance(tokens, mx.array) else mx.array(tokens)
        return Prepared((*kind, 0), tokens, tokens)
    table = path_table(layout)
    program = program_numbers(tree, taps) if taps is not None else np.zeros(0, np.int32)
    parts = [tokens, tree.depths, table.ravel(), program]
    numbers = mx.array(np.concatenate(parts).astype(np.int32))
    ends = np.cumsum([len(part) for part in parts]).tolist()
    layout.on_device["paths"] = numbers[ends[1] : ends[2]].reshape(table.shape)
    slots = 0
    if taps is not None:
        tree.on_device[place_of(taps)] = numbers[ends[2] :]
        slots = tree_program(tree, taps).slots
    return Prepared((*kind, slots), numbers[: ends[0]], numbers[ends[0] : ends[1]])
