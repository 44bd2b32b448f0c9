"""GatedDelta: a linear-attention layer with a gated delta state instead of keys and values.

Checkpoints store its input projections in two ways: fused (in_proj_qkvz, in_proj_ba, interleaved
per key head) and separate (in_proj_qkv, in_proj_z, in_proj_b, in_proj_a). Fused rows are put into
the separate order when they are read, so that there is one forward.
"""

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array, contiguous
from specdec.kernels.gated_delta import gates, normalize_keys
from specdec.kernels.linear import Projections, linear
from specdec.kernels.norm import gated_rms_norm
from specdec.kernels.weight import Weight
from specdec.target.config import GatedDeltaConfig, TargetConfig
from specdec.target.passes import Pass
from specdec.target.tensors import Tensors


class GatedDelta:
    """One layer's weights; `index` counts the linear-attention layers."""

    def __init__(self, tensors: Tensors, config: TargetConfig, index: int) -> None:
        assert config.gdn is not None
        self.gdn: GatedDeltaConfig = config.gdn
        self.index, self.eps = index, config.rms_norm_eps
        self.inputs = Projections(_input_weights(tensors, config.gdn))
        conv = tensors.array("conv1d.weight")
        self.conv = contiguous(conv[:, :, 0].swapaxes(0, 1))  # [taps, channels]
        self.a_log = tensors.array("A_log", mx.float32)
        self.dt_bias = tensors.array("dt_bias", mx.float32)
        self.norm = tensors.array("norm.weight")
        self.out = tensors.weight("out_proj")

    def __call__(self, x: Array, this: Pass) -> Array:
        """x [rows, hidden] -> [rows, hidden]."""
        gdn, rows = self.gdn, x.shape[0]
        qkv, z, b, a = self.inputs(x)
        qkv = this.convolve(self.index, qkv, self.conv)
        queries, keys = normalize_keys(
            qkv[:, : gdn.keys].reshape(rows, gdn.num_key_heads, gdn.key_dim),
            qkv[:, gdn.keys : 2 * gdn.keys].reshape(rows, gdn.num_key_heads, gdn.key_dim),
        )
        values = qkv[:, 2 * gdn.keys :].reshape(rows, gdn.num_value_heads, gdn.value_dim)
        decay, beta = gates(a, b, self.a_log, self.dt_bias)
        y = this.recur(self.index, queries, keys, values, decay, beta).astype(x.dtype)
        y = gated_rms_norm(y, z.reshape(y.shape), self.norm, self.eps)
        return linear(y.reshape(rows, -1), self.out)


def _input_weights(tensors: Tensors, gdn: GatedDeltaConfig) -> list[Weight]:
    """The projections qkv, z, b, a, whichever way they are stored."""
    if not tensors.has("in_proj_qkvz.weight"):
        return [tensors.weight(f"in_proj_{part}") for part in ("qkv", "z", "b", "a")]
    qkvz, ba = tensors.weight("in_proj_qkvz"), tensors.weight("in_proj_ba")
    # Per key head: its query, its key, then the values and z of its value heads.
    per_key = gdn.values // gdn.num_key_heads
    rows = np.arange(qkvz.out_features).reshape(gdn.num_key_heads, -1)
    splits = np.cumsum([gdn.key_dim, gdn.key_dim, per_key])
    q, k, v, z = (part.reshape(-1) for part in np.split(rows, splits, axis=1))
    ba_rows = np.arange(ba.out_features).reshape(gdn.num_key_heads, -1)
    b, a = (part.reshape(-1) for part in np.split(ba_rows, 2, axis=1))
    return [
        qkvz.rows(np.concatenate([q, k, v])),
        qkvz.rows(z),
        ba.rows(b),
        ba.rows(a),
    ]
