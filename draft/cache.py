"""ContextCache: one draft layer's keys and values of the committed tokens.

Rows are appended once per committed token and never change (keys are stored rotated). The rows of
the block being drafted are written behind them for the length of one pass and count for nothing;
so, where passes are graphs, are those told in the same pass until they are known to be committed.

Memory: 2 * kv_heads * head_dim * itemsize bytes per row. A full layer holds every token, a sliding
layer the window's; `capacity` says how many rows are allocated. Growing allocates the new buffer
beside the old one, a layer at a time.
"""

import mlx.core as mx
import numpy as np

from specdec.draft.config import DraftConfig
from specdec.kernels.array import Array, Backend, concatenate, evaluate
from specdec.kernels.written import Written

STEP = 256  # rows by which buffers grow


def capacity(context: int, block: int, window: int) -> int:
    """Rows allocated for a layer that holds `context` tokens and drafts `block` more, behind as
    many that may be told in the same pass.

    window: of a sliding layer, 0 for a full one. A sliding buffer is one step longer than what a
    query can see, so that rows move to its front once in a step and not once in a round.
    """
    seen = min(context, window - 1 + STEP) if window else context
    return -(-(seen + 2 * block) // STEP) * STEP


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
        self.rows = backend.zeros((2, kv_heads, 0, head_dim))
        """Keys and values [2, kv_heads, capacity, head_dim]."""
        self.written = Written(backend.dtype)
        self.start = self.end = 0

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
        self._reserve(count, max(self._window - 1 - count, 0))
        self._write(keys, values)
        self.end += count

    def with_block(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """The buffers [kv_heads, capacity, head_dim] with a block's rows behind the committed ones.

        Position p stands at place p - start. What lies behind the block means nothing.
        """
        assert keys.shape[1] == self._block
        self.make_room()
        self._write(keys, values)
        return self.rows[:1].squeeze(0), self.rows[1:].squeeze(0)

    def seen(self, position: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
        """The places that each row of a block at `position` sees: from first [block] to before
        last.

        A window reaches as far ahead as back; only with blocks longer than it does that matter.
        """
        query = np.arange(position, position + self._block)
        end, window, start = position + self._block, self._window, self.start
        first = np.maximum(query - window + 1, start) if window else np.full_like(query, start)
        last = np.minimum(query + window, end) if window else np.full_like(query, end)
        return first - start, (query + 1 if causal else last) - start

    def make_room(self) -> None:
        """For a block behind as many rows, which may not come to stay."""
        self._reserve(0, self._window - 1)

    def _write(self, keys: Array, values: Array) -> None:
        self.written.settle()
        at = self.end - self.start
        self.rows[0, :, at : at + keys.shape[1]] = keys
        self.rows[1, :, at : at + keys.shape[1]] = values

    def _reserve(self, count: int, keep: int) -> None:
        """Make room for `count` more rows and a block; of a sliding layer's keep the last."""
        rows = self.end - self.start
        if rows + count + 2 * self._block <= self.rows.shape[2]:
            return
        self.written.settle()
        keep = min(rows, keep) if self._window else rows
        size = capacity(self.end + count, self._block, self._window)
        heads, _, dim = self.rows.shape[1:]
        rest = self._backend.zeros((2, heads, size - keep, dim))
        grown = concatenate([self.rows[:, :, rows - keep : rows], rest], axis=2)
        evaluate(grown)  # or the old buffers of all layers would be held until a pass is done
        self.rows, self.start = grown, self.end - keep
