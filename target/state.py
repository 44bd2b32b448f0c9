"""State: what a target remembers of the committed tokens.

Keys and values of the full-attention layers, convolution rows and recurrent states of the gated
delta layers, and how many tokens they stand for. Only a prompt chunk and `commit` change it.
"""

from collections.abc import Sequence
from typing import TypeAlias

import mlx.core as mx

from specdec.kernels.array import Array, Backend, concatenate, evaluate
from specdec.kernels.attention_inputs import AttentionShape, attention_inputs
from specdec.kernels.linear import Piece
from specdec.kernels.written import Written
from specdec.target.config import TargetConfig

Projected: TypeAlias = tuple[Piece, Piece, Piece]  # queries, keys and values of a layer

KV_STEP = 256  # positions the key and value buffers grow by


class State:
    """Buffers of a session.

    keys, values: per full-attention layer [kv_heads, capacity, head_dim] in the engine's dtype;
        what stands from `length` on is not committed.
    conv: per gated delta layer [taps - 1, channels], the rows before the next token.
    recurrent: per gated delta layer float32 [value_heads, value_dim, key_dim].
    written: of keys and values, where kernels write in place.
    """

    def __init__(self, config: TargetConfig, backend: Backend) -> None:
        self.config, self.backend = config, backend
        self.length = 0
        self.written = Written(backend.dtype)
        empty = backend.zeros((config.num_kv_heads, 0, config.head_dim))
        self.keys = [empty for _ in config.full_layers]
        self.values = [empty for _ in config.full_layers]
        self.conv: list[Array] = []
        self.recurrent: list[Array] = []
        if config.gdn is not None:
            gdn, layers = config.gdn, config.linear_layers
            conv = backend.zeros((gdn.conv_kernel - 1, gdn.conv_channels))
            heads = (gdn.num_value_heads, gdn.value_dim, gdn.key_dim)
            self.conv = [conv for _ in layers]
            self.recurrent = [backend.zeros(heads, mx.float32) for _ in layers]

    @property
    def capacity(self) -> int:
        """Positions that keys and values have room for, 0 without full-attention layers."""
        return self.keys[0].shape[1] if self.keys else 0

    def make_room(self, rows: int) -> None:
        """Grow the buffers so that `rows` more can be staged: one after the other is made, so that
        memory holds one old buffer beside the new ones and not all of them."""
        for buffers in (self.keys, self.values):
            for index, buffer in enumerate(buffers):
                missing = self.length + rows - buffer.shape[1]
                if missing > 0:
                    self.written.settle()
                    steps = -(-missing // KV_STEP) * KV_STEP
                    more = self.backend.zeros((buffer.shape[0], steps, buffer.shape[2]))
                    grown = concatenate([buffer, more], axis=1)
                    evaluate(grown)
                    buffers[index] = grown

    def stage(
        self,
        index: int,
        projected: Projected,
        shape: AttentionShape,
        turn: tuple[Array, Array],
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """Queries [heads, rows, head_dim] of one layer, and its keys and values [kv_heads, rows,
        head_dim], which are written behind the committed ones, where there is room for them: they
        count once `length` is advanced."""
        queries, keys, values = attention_inputs(*projected, shape, *turn)
        self._write(index, keys, values)
        return queries, (keys, values)

    def keep(self, path: list[int], staged: Sequence[tuple[Array, Array]]) -> None:
        """Have the keys and values of these rows stand directly behind the committed ones.

        staged: per full-attention layer what was staged, or nothing where it stands in the buffers
        alone. MLX writes in place only into a buffer that nobody reads at the same time: what is
        moved is not read from there where there is another place.
        """
        if path == list(range(len(path))):
            return
        self.written.settle()
        if not staged:
            end = self.length + path[-1] + 1
            staged = [
                (keys[:, self.length : end], values[:, self.length : end])
                for keys, values in zip(self.keys, self.values, strict=True)
            ]
        rows = self.backend.index(path)
        for index, (keys, values) in enumerate(staged):
            self._write(index, keys[:, rows], values[:, rows])

    def _write(self, index: int, keys: Array, values: Array) -> None:
        self.written.settle()
        start, end = self.length, self.length + keys.shape[1]
        self.keys[index][:, start:end] = keys
        self.values[index][:, start:end] = values

    def advance(self, rows: int, conv: list[Array], recurrent: list[Array]) -> None:
        """The next `rows` staged tokens are committed, with these as the states after them."""
        self.conv, self.recurrent, self.length = conv, recurrent, self.length + rows
