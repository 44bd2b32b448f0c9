"""TargetConfig: what config.json says about an MoE target of one of the three families.

Reads qwen3_moe, qwen3_next and qwen3_5_moe (also nested under text_config). Refuses every other
model_type, attention biases, and values that contradict each other, naming file, key, value.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from specdec.checkpoint import Checkpoint
from specdec.config_reader import ConfigReader
from specdec.errors import CheckpointError
from specdec.kernels.rope import RopeConfig

FAMILIES = {
    "qwen3_moe": "qwen3_moe",
    "qwen3_next": "qwen3_next",
    "qwen3_5_moe": "qwen3_5_moe",
    "qwen3_5_moe_text": "qwen3_5_moe",
}
# How writers of checkpoints spell the text model, and where lm_head stands beside it.
PREFIXES = (
    ("language_model.model.", "language_model."),
    ("model.language_model.", ""),
    ("model.", ""),
)
FULL, LINEAR = "full_attention", "linear_attention"


@dataclass(frozen=True)
class GatedDeltaConfig:
    """Geometry of the gated delta (linear attention) layers."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_kernel: int

    @property
    def keys(self) -> int:
        """Features of all key heads."""
        return self.num_key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Features of all value heads."""
        return self.num_value_heads * self.value_dim

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: queries, keys and values."""
        return 2 * self.keys + self.values


@dataclass(frozen=True)
class TargetConfig:
    """Everything the forward pass and the plan need to know about a target."""

    family: str
    prefix: str  # of the tensor names, up to and with "model."
    head_prefix: str  # of lm_head
    hidden_size: int
    num_layers: int
    layer_types: tuple[str, ...]
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    attn_output_gate: bool
    rope: RopeConfig
    rms_norm_eps: float
    tie_word_embeddings: bool
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    shared_intermediate_size: int  # 0: no shared expert
    norm_topk_prob: bool
    dense_layers: frozenset[int]  # layers with a plain MLP instead of experts
    intermediate_size: int  # of that plain MLP
    gdn: GatedDeltaConfig | None
    max_position: int

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_layers) if i not in self.dense_layers)

    @property
    def full_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == FULL)

    @property
    def linear_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == LINEAR)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "TargetConfig":
        """The config of a checkpoint, tensor prefixes as its tensors spell them."""
        source = str(checkpoint.folder / "config.json")
        config = cls.from_dict(checkpoint.config, source)
        for prefix, head in PREFIXES:
            if f"{prefix}embed_tokens.weight" in checkpoint.tensors:
                return replace(config, prefix=prefix, head_prefix=head)
        raise CheckpointError(
            f"{checkpoint.folder}: no embed_tokens.weight under any of "
            f"{', '.join(repr(prefix) for prefix, _ in PREFIXES)}"
        )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], source: str) -> "TargetConfig":
        """Parse a config.json; `source` names the file in errors."""
        return _Reader(config, source).target()


class _Reader(ConfigReader):
    """The text model's keys, from text_config where there is one."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        model_type = config.get("model_type")
        text = config.get("text_config", config)
        if not isinstance(text, Mapping):
            raise CheckpointError(f"{source}: text_config is not an object")
        super().__init__(source, text, config)
        self.text = text
        for name in (model_type, text.get("model_type")):
            if isinstance(name, str) and name in FAMILIES:
                self.family = FAMILIES[name]
                break
        else:
            raise self.error(
                f"unknown model_type {model_type!r}; "
                f"this engine runs {', '.join(sorted(set(FAMILIES.values())))}"
            )

    def target(self) -> TargetConfig:
        layers = self.integer("num_hidden_layers")
        hybrid = self.family != "qwen3_moe"
        if self.flag("attention_bias", False):
            raise self.error("attention_bias = true is not supported")
        activation = self.text.get("hidden_act", "silu")
        if activation != "silu":
            raise self.error(f"hidden_act = {activation!r}, expected 'silu'")
        if self.flag("use_sliding_window", False):
            raise self.error("use_sliding_window = true is not supported")
        hidden = self.integer("hidden_size")
        heads, kv_heads, head_dim = self.attention_heads(hidden)
        experts = self.integer("num_experts")
        top_k = self.integer("num_experts_per_tok")
        if top_k > experts:
            raise self.error(f"num_experts_per_tok = {top_k} exceeds num_experts = {experts}")
        shared = self.integer("shared_expert_intermediate_size", 0, 0) if hybrid else 0
        return TargetConfig(
            family=self.family,
            prefix="language_model.model." if self.family == "qwen3_5_moe" else "model.",
            head_prefix="language_model." if self.family == "qwen3_5_moe" else "",
            hidden_size=hidden,
            num_layers=layers,
            layer_types=self.layer_types(layers, (FULL, LINEAR) if hybrid else (FULL,)),
            vocab_size=self.integer("vocab_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            attn_output_gate=hybrid and self.flag("attn_output_gate", True),
            rope=self.rope(head_dim),
            rms_norm_eps=self.positive("rms_norm_eps", 1e-6),
            tie_word_embeddings=self.flag("tie_word_embeddings", False),
            num_experts=experts,
            top_k=top_k,
            moe_intermediate_size=self.integer("moe_intermediate_size"),
            shared_intermediate_size=shared,
            # Qwen3.5 has no such key: it always normalizes.
            norm_topk_prob=self.flag("norm_topk_prob", self.family == "qwen3_5_moe"),
            dense_layers=self.dense_layers(layers),
            intermediate_size=self.integer("intermediate_size", 0, 0),
            gdn=self.gated_delta() if hybrid else None,
            max_position=self.integer("max_position_embeddings"),
        )

    def rope(self, head_dim: int) -> RopeConfig:
        # Qwen3-Next and Qwen3.5 turn a quarter of a head where the config does not say.
        silent = {} if self.family == "qwen3_moe" else {"partial_rotary_factor": 0.25}
        return RopeConfig.from_config({**silent, **self.text}, head_dim, self.source)

    def layer_types(self, layers: int, known: tuple[str, ...]) -> tuple[str, ...]:
        kinds = self.text.get("layer_types")
        if kinds is None and LINEAR not in known:
            return (FULL,) * layers
        if kinds is None:
            interval = self.integer("full_attention_interval", 4)
            return tuple(FULL if (i + 1) % interval == 0 else LINEAR for i in range(layers))
        if (
            not isinstance(kinds, list)
            or len(kinds) != layers
            or any(kind not in known for kind in kinds)
        ):
            raise self.error(
                f"layer_types must list {layers} times {' or '.join(map(repr, known))}, "
                f"found {kinds!r}"
            )
        return tuple(kinds)

    def dense_layers(self, layers: int) -> frozenset[int]:
        if self.family == "qwen3_5_moe":
            return frozenset()
        listed = self.text.get("mlp_only_layers") or []
        if not isinstance(listed, list) or not all(type(layer) is int for layer in listed):
            raise self.error(f"mlp_only_layers = {listed!r}, expected a list of layer numbers")
        step = self.integer("decoder_sparse_step", 1)
        return frozenset(i for i in range(layers) if i in listed or (i + 1) % step)

    def gated_delta(self) -> GatedDeltaConfig:
        config = GatedDeltaConfig(
            num_key_heads=self.integer("linear_num_key_heads"),
            num_value_heads=self.integer("linear_num_value_heads"),
            key_dim=self.integer("linear_key_head_dim"),
            value_dim=self.integer("linear_value_head_dim"),
            conv_kernel=self.integer("linear_conv_kernel_dim", minimum=2),
        )
        if config.num_value_heads % config.num_key_heads:
            raise self.error(
                f"linear_num_value_heads = {config.num_value_heads} is no multiple of "
                f"linear_num_key_heads = {config.num_key_heads}"
            )
        return config
