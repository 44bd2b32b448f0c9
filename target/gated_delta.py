"""GatedDelta: a linear-attention layer with a gated delta state instead of keys and values.

Checkpoints store its input projections in two ways: fused (in_proj_qkvz, in_proj_ba, interleaved
per key head) and separate (in_proj_qkv, in_proj_z, in_proj_b, in_proj_a). Fused rows are put into
the separate order when they are read, so that there is one forward.
"""

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array, contiguous
from specdec.kernels.gated_delta import DeltaInputs, DeltaWeights
from specdec.kernels.linear import Projections, linear
from specdec.kernels.norm import Norm
from specdec.kernels.weight import Weight
from specdec.target.config import GatedDeltaConfig, TargetConfig
from specdec.target.passes import Pass
from specdec.target.tensors import Tensors


class GatedDelta:
    """One layer's weights, with the norm before it; `index` counts the linear-attention layers."""

    def __init__(self, tensors: Tensors, norm: Norm, config: TargetConfig, index: int) -> None:
        assert config.gdn is not None
        gdn = config.gdn
        self.norm, self.index = norm, index
        self.inputs = Projections(_input_weights(tensors, gdn))
        conv = tensors.array("conv1d.weight")
        self.weights = DeltaWeights(
            contiguous(conv[:, :, 0].swapaxes(0, 1)),  # [taps, channels]
            tensors.array("A_log", mx.float32),
            tensors.array("dt_bias", mx.float32),
            Norm(tensors.array("norm.weight"), config.rms_norm_eps),
            gdn.num_key_heads,
            gdn.num_value_heads,
            gdn.key_dim,
            gdn.value_dim,
        )
        self.out = tensors.weight("out_proj")

    def __call__(self, x: Array, this: Pass) -> Array:
        """x [rows, hidden] plus what the layer adds."""
        inputs = DeltaInputs(*self.inputs(x, self.norm))
        return linear(this.mix(self.index, inputs, self.weights), self.out, residual=x)


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
