"""Attention: a full-attention layer with grouped heads, q/k norms, partial rotary, output gate."""

from specdec.kernels.array import Array
from specdec.kernels.attention_inputs import AttentionShape
from specdec.kernels.linear import Projections, linear
from specdec.kernels.norm import Norm
from specdec.target.config import TargetConfig
from specdec.target.passes import Pass
from specdec.target.tensors import Tensors


class Attention:
    """One layer's weights, with the norm before it; `index` counts the full-attention layers."""

    def __init__(self, tensors: Tensors, norm: Norm, config: TargetConfig, index: int) -> None:
        self.norm, self.index = norm, index
        self.qkv = Projections([tensors.weight(name) for name in ("q_proj", "k_proj", "v_proj")])
        self.out = tensors.weight("o_proj")
        self.shape = AttentionShape(
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.attn_output_gate,
            Norm(tensors.array("q_norm.weight"), config.rms_norm_eps),
            Norm(tensors.array("k_norm.weight"), config.rms_norm_eps),
        )

    def __call__(self, x: Array, this: Pass) -> Array:
        """x [rows, hidden] plus its attention."""
        queries, keys, values = self.qkv(x, self.norm)
        gate = queries if self.shape.gated else None
        out = this.attend(self.index, (queries, keys, values), self.shape, this.turn(x), gate)
        return linear(out, self.out, residual=x)
