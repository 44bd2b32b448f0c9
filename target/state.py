"""State: what a target remembers of the committed tokens.

Keys and values of the full-attention layers, convolution rows and recurrent states of the gated
delta layers, and how many tokens they stand for. Only a prompt chunk and `commit` change it.
"""

import mlx.core as mx

from specdec.target.config import TargetConfig

KV_STEP = 256  # positions the key and value buffers grow by


class State:
    """Buffers of a session.

    keys, values: per full-attention layer [kv_heads, capacity, head_dim] in the engine's dtype;
        rows from `length` on are undefined.
    conv: per gated delta layer [taps - 1, channels], the rows before the next token.
    recurrent: float32 [gated delta layers, value_heads, value_dim, key_dim].
    """

    def __init__(self, config: TargetConfig, dtype: mx.Dtype) -> None:
        self.config, self.dtype = config, dtype
        self.length = 0
        empty = mx.zeros((config.num_kv_heads, 0, config.head_dim), dtype)
        self.keys = [empty for _ in config.full_layers]
        self.values = [empty for _ in config.full_layers]
        gdn, layers = config.gdn, len(config.linear_layers)
        self.conv: list[mx.array] = []
        self.recurrent = mx.zeros((0,))
        if gdn is not None and layers:
            conv = mx.zeros((gdn.conv_kernel - 1, gdn.conv_channels), dtype)
            self.conv = [conv for _ in range(layers)]
            heads = (gdn.num_value_heads, gdn.value_dim, gdn.key_dim)
            self.recurrent = mx.zeros((layers, *heads), mx.float32)

    def append(self, index: int, keys: mx.array, values: mx.array) -> None:
        """Write keys and values [kv_heads, rows, head_dim] of one layer behind the committed ones.

        They count once `length` is advanced.
        """
        start, end = self.length, self.length + keys.shape[1]
        for buffers, new in ((self.keys, keys), (self.values, values)):
            buffer = buffers[index]
            missing = end - buffer.shape[1]
            if missing > 0:
                steps = -(-missing // KV_STEP) * KV_STEP
                more = mx.zeros((buffer.shape[0], steps, buffer.shape[2]), self.dtype)
                buffer = mx.concatenate([buffer, more], axis=1)
            buffer[:, start:end] = new
            buffers[index] = buffer

    def arrays(self) -> list[mx.array]:
        """Everything to evaluate."""
        return [*self.keys, *self.values, *self.conv, self.recurrent]
