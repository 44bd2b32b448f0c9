"""DraftConfig: what config.json says about a DFlash draft, in any of its published spellings.

DFlash's own keys stand in `dflash_config` or at the top level; where both have one, dflash_config
wins, as in z-lab's code. Serving hints (runtime_block_size, draft_window_size) are not read: the
draft runs with the block and the windows it was trained with.

Refuses DFlash 2 (convolutions around the sublayers, candidate selector), attention sinks, biases
and every activation but SiLU: a draft that lacks a part of itself drafts nonsense without an error.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from specdec.config_reader import ConfigReader
from specdec.errors import CheckpointError
from specdec.kernels.rope import RopeConfig

FULL, SLIDING = "full_attention", "sliding_attention"
_DFLASH2 = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")


@dataclass(frozen=True)
class DraftConfig:
    """Everything the draft's forward pass and the memory plan need to know.

    block_size: rows of one draft pass, the bonus token and block_size - 1 drafted slots.
    target_layer_ids: target layers whose outputs are tapped, in the order `fc` expects them.
    num_target_layers: layers of the target the draft was trained for, None when not said.
    windows: per layer, a query sees keys less than this many positions away; 0 = all of them.
    causal: per layer, whether block rows see only the block rows before them.
    final_logit_softcapping: logits become cap * tanh(logits / cap); 0 = off.
    input_embedding_scale, output_multiplier: factors on embeddings and logits.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeConfig
    block_size: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int | None
    mask_token_id: int
    windows: tuple[int, ...]
    causal: tuple[bool, ...]
    final_logit_softcapping: float = 0.0
    input_embedding_scale: float = 1.0
    output_multiplier: float = 1.0

    def __post_init__(self) -> None:
        assert self.num_heads % self.num_kv_heads == 0
        assert len(self.windows) == len(self.causal) == self.num_layers
        assert all(window >= 0 for window in self.windows)
        assert self.block_size >= 2
        assert self.target_layer_ids
        assert self.mask_token_id >= 0

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], source: str = "config.json") -> "DraftConfig":
        """Parse a draft's config.json; CheckpointError naming `source`, key, value, expectation."""
        return _Reader(config, source).draft()

    @property
    def slots(self) -> int:
        """Positions drafted in one pass."""
        return self.block_size - 1


def default_target_layer_ids(target_layers: int, count: int) -> tuple[int, ...]:
    """The taps of a draft whose config names none: `count` layers spread over the target.

    From the second layer to the third last, as z-lab's training code does (Python's rounding).
    """
    if count == 1:
        return (target_layers // 2,)
    span = target_layers - 4
    return tuple(round(1 + i * span / (count - 1)) for i in range(count))


class _Reader(ConfigReader):
    """DFlash's own keys count from dflash_config first, then from the top level."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.top = config
        own = config.get("dflash_config") or {}
        if not isinstance(own, Mapping):
            raise CheckpointError(f"{source}: dflash_config is {own!r}, expected an object")
        super().__init__(source, own, config)
        self.own = own

    def draft(self) -> DraftConfig:
        self.refuse()
        layers = self.integer("num_hidden_layers")
        hidden = self.integer("hidden_size")
        heads, kv_heads, head_dim = self.attention_heads(hidden)
        vocab = self.integer("vocab_size")
        mask = self.integer("mask_token_id", minimum=0)
        if mask >= vocab:
            raise self.error(f"mask_token_id = {mask}, expected an id below vocab_size = {vocab}")
        kinds = self.layer_types(layers)
        return DraftConfig(
            hidden_size=hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=self.integer("intermediate_size"),
            vocab_size=vocab,
            rms_norm_eps=self.positive("rms_norm_eps", 1e-6),
            rope=RopeConfig.from_config(self.top, head_dim, self.source),
            block_size=self.integer("block_size", 16, minimum=2),
            target_layer_ids=self.target_layer_ids(layers),
            num_target_layers=self.integer("num_target_layers", 0, minimum=0) or None,
            mask_token_id=mask,
            windows=self.windows(kinds),
            causal=self.causal(kinds),
            final_logit_softcapping=self.positive("final_logit_softcapping", 0.0, zero=True),
            input_embedding_scale=self.positive("input_embedding_scale", 1.0),
            output_multiplier=self.positive("output_multiplier", 1.0),
        )

    def refuse(self) -> None:
        """What is no DFlash draft, or one with parts that are not implemented here."""
        names = self.top.get("architectures") or []
        if not isinstance(names, list | tuple):
            raise self.error(f"architectures = {names!r}, expected a list of names")
        extra = [key for key in _DFLASH2 if self.get(key)]
        if extra or any("DFlash2" in str(name) for name in names):
            found = ", ".join([*(str(name) for name in names), *extra])
            raise self.error(
                f"this is a DFlash 2 draft ({found}): its convolutions and candidate selector "
                "are not supported, expected a DFlashDraftModel"
            )
        if "dflash_config" not in self.top and "DFlashDraftModel" not in names:
            raise self.error(f"architectures = {names!r} and no dflash_config: not a DFlash draft")
        model_type = self.top.get("model_type", "qwen3")
        if model_type != "qwen3":
            raise self.error(f"model_type = {model_type!r}, expected 'qwen3' for a DFlash draft")
        for key in ("attention_sink_bias", "attention_bias"):
            if self.get(key):
                raise self.error(f"{key} = {self.get(key)!r} is not supported, expected false")
        if self.top.get("hidden_act", "silu") != "silu":
            raise self.error(f"hidden_act = {self.top['hidden_act']!r}, expected 'silu'")

    def target_layer_ids(self, layers: int) -> tuple[int, ...]:
        ids = self.get("target_layer_ids")
        if ids is None:
            return default_target_layer_ids(self.integer("num_target_layers", minimum=4), layers)
        good = isinstance(ids, list | tuple) and len(ids) > 0
        if not good or not all(type(i) is int and i >= 0 for i in ids):
            raise self.error(f"target_layer_ids = {ids!r}, expected a list of layer numbers from 0")
        return tuple(ids)

    def layer_types(self, layers: int) -> tuple[str, ...]:
        kinds = self.top.get("layer_types")
        if kinds is None:
            if self.own.get("use_swa"):
                return (SLIDING,) * layers
            # Qwen3's rule for configs without layer_types.
            sliding = self.top.get("use_sliding_window") and self.top.get("sliding_window")
            first = self.integer("max_window_layers", 28, minimum=0) if sliding else layers
            return tuple(SLIDING if i >= first else FULL for i in range(layers))
        if not isinstance(kinds, list | tuple) or len(kinds) != layers:
            raise self.error(f"layer_types = {kinds!r}, expected a list of {layers}")
        unknown = sorted({str(kind) for kind in kinds} - {FULL, SLIDING})
        if unknown:
            raise self.error(f"layer_types has {', '.join(unknown)}, expected {FULL} or {SLIDING}")
        return tuple(kinds)

    def windows(self, kinds: tuple[str, ...]) -> tuple[int, ...]:
        if SLIDING not in kinds:
            return (0,) * len(kinds)
        if self.top.get("use_sliding_window") is False and not self.own.get("use_swa"):
            raise self.error(
                "use_sliding_window = false, but layer_types has sliding layers: "
                "expected true, or full layers alone"
            )
        sizes = {
            self.integer(key)
            for key in ("sliding_window", "swa_window_size")
            if self.get(key) is not None
        }
        if len(sizes) != 1:
            raise self.error(
                f"the window of the sliding layers is {sorted(sizes) or 'missing'}, expected one "
                "sliding_window (or dflash_config.swa_window_size)"
            )
        return tuple(min(sizes) if kind == SLIDING else 0 for kind in kinds)

    def causal(self, kinds: tuple[str, ...]) -> tuple[bool, ...]:
        """is_causal, else dflash_config.causal, else the published habit (vLLM's rule)."""
        for key, value in (
            ("is_causal", self.top.get("is_causal")),
            ("dflash_config.causal", self.own.get("causal")),
        ):
            if value is not None:
                if not isinstance(value, bool):
                    raise self.error(f"{key} = {value!r}, expected true or false")
                return (value,) * len(kinds)
        return tuple(kind == SLIDING for kind in kinds)
