"""Manifest: the names and shapes of a target's tensors, its experts aside.

Checked against the headers before anything is read. Refuses a missing or misshapen tensor, integers
where floats belong, and a tensor under the text model's prefix that the forward pass would not use:
a layer too many, a bias, an attention sink. What stands beside the text model (vision, multi-token
heads) is not looked at, nor is a copy of the head in a checkpoint that ties it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from specdec.checkpoint import Checkpoint
from specdec.errors import CheckpointError
from specdec.target.config import FULL, GatedDeltaConfig, TargetConfig

# Tensors under the prefix that are computed here, not read.
_COMPUTED = (".rotary_emb.inv_freq",)
_PARTS = (".weight", ".scales", ".biases")


@dataclass(frozen=True)
class Manifest:
    """matrices: module path -> (out, in), dense or packed. arrays: tensor name -> shape."""

    matrices: dict[str, tuple[int, int]]
    arrays: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, checkpoint: Checkpoint, config: TargetConfig) -> Self:
        """What the checkpoint must hold, and does: CheckpointError names what is wrong."""
        entries = dict(_entries(checkpoint, config))
        manifest = cls(
            {name: (s[0], s[1]) for name, s in entries.items() if not _is_array(name)},
            {name: shape for name, shape in entries.items() if _is_array(name)},
        )
        manifest._check(checkpoint, config)
        return manifest

    def _check(self, checkpoint: Checkpoint, config: TargetConfig) -> None:
        for path, (out, into) in self.matrices.items():
            packing = checkpoint.quantization(path, into)
            columns = into if packing is None else into * packing.bits // 32
            checkpoint.info(f"{path}.weight", (out, columns))
        for name, shape in self.arrays.items():
            checkpoint.floats(name, shape)
        known = {path + part for path in self.matrices for part in _PARTS} | self.arrays.keys()
        surplus = [
            name
            for name in checkpoint.tensors
            if name.startswith(config.prefix)
            and name not in known
            and ".mlp.switch_mlp." not in name
            and not name.endswith(_COMPUTED)
        ]
        if surplus:
            shown = ", ".join(sorted(surplus)[:4]) + (", ..." if len(surplus) > 4 else "")
            raise CheckpointError(
                f"{checkpoint.folder}: {len(surplus)} tensors are no part of a {config.family} of "
                f"{config.num_layers} layers as config.json describes it: {shown}"
            )


def _is_array(name: str) -> bool:
    return name.endswith((".weight", ".A_log", ".dt_bias"))


def _entries(checkpoint: Checkpoint, config: TargetConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Matrices by path, arrays by name."""
    prefix, hidden = config.prefix, config.hidden_size
    yield f"{prefix}embed_tokens", (config.vocab_size, hidden)
    yield f"{prefix}norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield f"{config.head_prefix}lm_head", (config.vocab_size, hidden)
    for i, kind in enumerate(config.layer_types):
        layer = f"{prefix}layers.{i}."
        yield f"{layer}input_layernorm.weight", (hidden,)
        yield f"{layer}post_attention_layernorm.weight", (hidden,)
        if kind == FULL:
            yield from _attention(f"{layer}self_attn.", config)
        else:
            assert config.gdn is not None
            mixer = f"{layer}linear_attn."
            fused = f"{mixer}in_proj_qkvz.weight" in checkpoint.tensors
            yield from _gated_delta(mixer, config.gdn, hidden, fused)
        if i in config.dense_layers:
            yield from _mlp(f"{layer}mlp.", hidden, config.intermediate_size)
        else:
            yield f"{layer}mlp.gate", (config.num_experts, hidden)
            if config.shared_intermediate_size:
                yield f"{layer}mlp.shared_expert_gate", (1, hidden)
                shared = f"{layer}mlp.shared_expert."
                yield from _mlp(shared, hidden, config.shared_intermediate_size)


def _attention(module: str, config: TargetConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, dim = config.hidden_size, config.head_dim
    gates = 2 if config.attn_output_gate else 1
    yield f"{module}q_proj", (config.num_heads * dim * gates, hidden)
    yield f"{module}k_proj", (config.num_kv_heads * dim, hidden)
    yield f"{module}v_proj", (config.num_kv_heads * dim, hidden)
    yield f"{module}o_proj", (hidden, config.num_heads * dim)
    yield f"{module}q_norm.weight", (dim,)
    yield f"{module}k_norm.weight", (dim,)


def _gated_delta(
    module: str, gdn: GatedDeltaConfig, hidden: int, fused: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    heads = gdn.num_value_heads
    if fused:
        yield f"{module}in_proj_qkvz", (gdn.conv_channels + gdn.values, hidden)
        yield f"{module}in_proj_ba", (2 * heads, hidden)
    else:
        yield f"{module}in_proj_qkv", (gdn.conv_channels, hidden)
        yield f"{module}in_proj_z", (gdn.values, hidden)
        yield f"{module}in_proj_b", (heads, hidden)
        yield f"{module}in_proj_a", (heads, hidden)
    yield f"{module}conv1d.weight", (gdn.conv_channels, gdn.conv_kernel, 1)
    yield f"{module}A_log", (heads,)
    yield f"{module}dt_bias", (heads,)
    yield f"{module}norm.weight", (gdn.value_dim,)
    yield f"{module}out_proj", (hidden, gdn.values)


def _mlp(module: str, hidden: int, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{module}gate_proj", (inner, hidden)
    yield f"{module}up_proj", (inner, hidden)
    yield f"{module}down_proj", (hidden, inner)
