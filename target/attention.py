"""Attention: a full-attention layer with grouped heads, q/k norms, partial rotary, output gate."""

from specdec.kernels.array import Array
from specdec.kernels.linear import Projections, linear
from specdec.kernels.norm import rms_norm, sigmoid_gate
from specdec.kernels.rope import Rope
from specdec.target.config import TargetConfig
from specdec.target.passes import Pass
from specdec.target.tensors import Tensors


class Attention:
    """One layer's weights; `index` counts the full-attention layers."""

    def __init__(self, tensors: Tensors, config: TargetConfig, rope: Rope, index: int) -> None:
        self.config, self.rope, self.index = config, rope, index
        self.qkv = Projections([tensors.weight(name) for name in ("q_proj", "k_proj", "v_proj")])
        self.out = tensors.weight("o_proj")
        self.q_norm = tensors.array("q_norm.weight")
        self.k_norm = tensors.array("k_norm.weight")

    def __call__(self, x: Array, this: Pass) -> Array:
        """x [rows, hidden] -> [rows, hidden]."""
        config = self.config
        rows, dim = x.shape[0], config.head_dim
        queries, keys, values = self.qkv(x)
        queries = queries.reshape(rows, config.num_heads, -1)
        gate = None
        if config.attn_output_gate:  # per head: the query, then its gate
            queries, gate = queries[..., :dim], queries[..., dim:].reshape(rows, -1)
        queries = rms_norm(queries, self.q_norm, config.rms_norm_eps).swapaxes(0, 1)
        keys = keys.reshape(rows, config.num_kv_heads, dim)
        keys = rms_norm(keys, self.k_norm, config.rms_norm_eps).swapaxes(0, 1)
        values = values.reshape(rows, config.num_kv_heads, dim).swapaxes(0, 1)
        out = this.attend(
            self.index,
            self.rope(queries, this.positions),
            self.rope(keys, this.positions),
            values,
            dim**-0.5,
        )
        out = out.swapaxes(0, 1).reshape(rows, -1)  # [rows, heads * dim]
        return linear(out if gate is None else sigmoid_gate(out, gate), self.out)
