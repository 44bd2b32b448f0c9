"""What the GPU kernels take."""

# A mask of rows is 32 bits wide, and more rows than these belong to a prompt, where MLX's own
# matrix kernels are the fast ones.
MAX_ROWS = 32


class Unsupported(Exception):
    """A kernel does not take this; the message names the kernel, what was found, what it takes."""


# What kernels did not take, in words, so that plain MLX operations computed it: in this process.
refused: dict[str, None] = {}
