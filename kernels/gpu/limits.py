"""What the GPU kernels take."""

import mlx.core as mx

# A mask of rows is 32 bits wide, and more rows than these belong to a prompt, where MLX's own
# matrix kernels are the fast ones.
MAX_ROWS = 32
# Sizes of trees worth choosing from: a kernel is compiled for each number of rows.
TREE_NODES = (1, 2, 4, 6, 8, 12, 16, 24, 31)

MAX_DIM = 256  # of a head
MAX_GROUP = 16  # of heads that share keys and values

FLOATS = (mx.float32, mx.float16, mx.bfloat16)
# Bits and group sizes of the packed weights that weights.h reads.
PACKED = {2, 3, 4, 5, 6, 8}
GROUPS = {32, 64, 128}


class Unsupported(Exception):
    """A kernel does not take this; the message names the kernel, what was found, what it takes."""


def check_heads(
    kernel: str, dtypes: set[mx.Dtype], rows: int, heads: int, kv_heads: int, dim: int
) -> None:
    if len(dtypes) > 1 or not dtypes <= set(FLOATS):
        found = ", ".join(sorted(map(str, dtypes)))
        raise Unsupported(f"kernel {kernel}: {found}, expected one type of float for all")
    if not 1 <= rows <= MAX_ROWS:
        raise Unsupported(f"kernel {kernel}: {rows} rows, expected 1 to {MAX_ROWS}")
    if dim % 32 or not 32 <= dim <= MAX_DIM:
        raise Unsupported(
            f"kernel {kernel}: head dim {dim}, expected a multiple of 32 up to {MAX_DIM}"
        )
    if heads % kv_heads or heads // kv_heads > MAX_GROUP:
        raise Unsupported(
            f"kernel {kernel}: {heads} heads, {kv_heads} of keys, "
            f"expected groups of 1 to {MAX_GROUP}"
        )


# What kernels did not take, in words, so that plain MLX operations computed it: in this process.
refused: dict[str, None] = {}
