"""TreeProgram: in which order a kernel that carries a state walks a tree, depth first.

The state at hand goes from a row to its child. It is kept, in a slot, only at rows of which several
children have children: a leaf leaves the state as it is for its siblings. The child that needs most
slots comes last, when its parent's slot is free again, so rows need at most log2(rows) slots.
"""

from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from specdec.kernels.layout import LAYOUTS, TreeLayout

NO_SLOT = -1


class Step(NamedTuple):
    """A row; the slot of the state it begins with and the one to keep its state in, or NO_SLOT for
    the state at hand and for none; whether it is a leaf."""

    row: int
    begin: int
    keep: int
    leaf: bool


def tree_program(tree: TreeLayout, taps: int) -> mx.array:
    """int32 [1 + rows * (4 + taps)], as delta_tree.metal says. Made once for a tree, and kept with
    it."""
    name = place_of(taps)
    if name not in tree.on_device:
        tree.on_device[name] = mx.array(program_numbers(tree, taps))
    return tree.on_device[name]


def most_slots(rows: int) -> int:
    """As many as a tree of so many rows may need."""
    return rows.bit_length() - 1


def program_numbers(tree: TreeLayout, taps: int) -> np.ndarray:
    """`tree_program` on the host."""
    walk = _walk(tree)
    table = np.concatenate([walk, tree.windows(taps)[walk[:, 0]]], axis=1)
    return np.append(np.int32(len(walk)), table.ravel())


def place_of(taps: int) -> str:
    """The name of a program among what lies beside a tree."""
    return f"program of {taps} taps"


@lru_cache(maxsize=LAYOUTS)  # trees are compared by identity
def _walk(tree: TreeLayout) -> np.ndarray:
    return np.array(steps(tree.parents.tolist()), np.int32)


def steps(parents: list[int]) -> list[Step]:
    """Every row once, children after their parent."""
    children: list[list[int]] = [[] for _ in parents]
    for row, parent in enumerate(parents[1:], 1):
        children[parent].append(row)
    inner = [[child for child in below if children[child]] for below in children]
    needs = [0] * len(parents)  # slots for the rows below
    for row in reversed(range(len(parents))):
        inner[row].sort(key=needs.__getitem__)
        last = len(inner[row]) - 1
        needs[row] = max((needs[c] + (i < last) for i, c in enumerate(inner[row])), default=0)
    walk: list[Step] = []
    waiting = [(0, NO_SLOT, 0)]  # row, slot to begin with, slots taken; the next one is at the end
    while waiting:
        row, begin, taken = waiting.pop()
        keep = taken if len(inner[row]) > 1 else NO_SLOT
        walk.append(Step(row, begin, keep, not children[row]))
        walk += [Step(c, NO_SLOT, NO_SLOT, True) for c in children[row] if not children[c]]
        for i, child in reversed(list(enumerate(inner[row]))):
            still = taken + (i < len(inner[row]) - 1)
            waiting.append((child, keep if i else NO_SLOT, still))
    return walk
