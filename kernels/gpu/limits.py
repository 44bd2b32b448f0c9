"""What the GPU kernels take."""

import mlx.core as mx

# A mask of rows is 32 bits wide, and more rows than these belong to a prompt, where MLX's own
# matrix kernels are the fast ones.
MAX_ROWS = 32
# Sizes of trees worth choosing from: a kernel is compiled for each number of rows.
TREE_NODES = (1, 2, 4, 6, 8, 12, 16, 24, 31)

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
# Bits and group sizes of the packed weights that weights.h reads.
PACKED = {2, 3, 4, 5, 6, 8}
GROUPS = {32, 64, 128}


class Unsupported(Exception):
    """A kernel does not take this; the message names the kernel, what was found, what it takes."""


# What kernels did not take, in words, so that plain MLX operations computed it: in this process.
refused: dict[str, None] = {}
