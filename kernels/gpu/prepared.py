"""Prepared: what the kernels read of a verify pass, made before the first of them is launched."""

from specdec.kernels.attention import AttentionLayout
from specdec.kernels.gpu.attention import block_count, paths
from specdec.kernels.gpu.tree_program import tree_program


def prepare(layout: AttentionLayout, taps: int | None) -> tuple[int, ...]:
    """Put arrays beside the layout and its tree (on_device), all that kernels read of either.

    taps: of the convolution of gated delta layers, None without such layers. Returns what the
    launches follow from: passes for which it is the same are the same but for their arrays.
    """
    tree = layout.tree
    paths(layout)
    slots = tree_program(tree, taps).slots if taps is not None and tree.rows > 1 else 0
    return tree.rows, block_count(layout), slots
