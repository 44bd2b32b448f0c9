"""ContextCache: one draft layer's keys and values of the committed tokens.

Rows are appended once per committed token and never change (keys are stored rotated). The rows of
the block being drafted are written behind them for the length of one pass and count for nothing.

Memory: 2 * kv_heads * head_dim * itemsize bytes per row. A full layer holds every token, a sliding
layer the window's; `capacity` says how many rows are allocated. Growing allocates the new buffer
beside the old one, a layer at a time.
"""

import mlx.core as mx

from specdec.draft.config import DraftConfig
from specdec.kernels.array import Array, Backend, concatenate

STEP = 256  # rows by which buffers grow


def capacity(context: int, block: int, window: int) -> int:
    """Rows allocated for a layer that holds `context` tokens and drafts `block` more.

    window: of a sliding layer, 0 for a full one. A sliding buffer is one step longer than what a
    query can see, so that rows move to its front once in a step and not once in a round.
    """
    seen = min(context, window - 1 + STEP) if window else context
    return -(-(seen + block) // STEP) * STEP


def cache_bytes(config: DraftConfig, context: int, dtype: mx.Dtype) -> int:
    """Bytes of a draft's cache, all layers, once `context` tokens are committed."""
    row = 2 * config.num_kv_heads * config.head_dim * dtype.size
    return row * sum(capacity(context, config.block_size, window) for window in config.windows)


class ContextCache:
    """Keys and values [kv_heads, rows, head_dim] of positions `start` to `end` - 1."""

    def __init__(
        self, kv_heads: int, head_dim: int, block: int, window: int, backend: Backend
    ) -> None:
        self._block, self._window, self._backend = block, window, backend
        self._keys = backend.zeros((kv_heads, 0, head_dim))
        self._values = backend.zeros((kv_heads, 0, head_dim))
        self.start = self.end = 0

    @property
    def arrays(self) -> tuple[Array, Array]:
        """The buffers, for evaluation."""
        return self._keys, self._values

    def rows_to_keep(self, count: int) -> int:
        """Of `count` rows about to be appended, how many of the last can ever be seen."""
        return min(count, self._window - 1) if self._window else count

    def append(self, keys: Array, values: Array, position: int) -> None:
        """Add committed rows [kv_heads, n, head_dim]; `position` is the first one's.

        It may lie beyond `end` where the rows between are outside the window already. Rows from
        `position` on that an interrupted call left behind are replaced.
        """
        count = keys.shape[1]
        if position > self.end:
            assert self._window
            assert count == self._window - 1
            self.start = position
        self.end = position
        if count == 0:
            return
        self._reserve(count)
        at = self.end - self.start
        self._keys[:, at : at + count] = keys
        self._values[:, at : at + count] = values
        self.end += count

    def with_block(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """The buffers [kv_heads, capacity, head_dim] with a block's rows behind the committed ones.

        Position p stands at place p - start. What lies behind the block means nothing.
        """
        assert keys.shape[1] == self._block
        self._reserve(0)
        at = self.end - self.start
        self._keys[:, at : at + self._block] = keys
        self._values[:, at : at + self._block] = values
        return self._keys, self._values

    def _reserve(self, count: int) -> None:
        """Make room for `count` more rows and a block."""
        rows = self.end - self.start
        if rows + count + self._block <= self._keys.shape[1]:
            return
        keep = min(rows, max(self._window - 1 - count, 0)) if self._window else rows
        size = capacity(self.end + count, self._block, self._window)
        self._keys = self._moved(self._keys, rows - keep, rows, size)
        self._values = self._moved(self._values, rows - keep, rows, size)
        self.start = self.end - keep

    def _moved(self, buffer: Array, start: int, stop: int, size: int) -> Array:
        """Rows start to stop of a buffer at the front of a new one of `size` rows."""
        heads, _, dim = buffer.shape
        rest = self._backend.zeros((heads, size - (stop - start), dim))
        return concatenate([buffer[:, start:stop], rest], axis=1)
