"""Every published spelling of a draft's config, and what is refused."""

import pytest

from specdec.draft.config import DraftConfig, default_target_layer_ids
from specdec.errors import CheckpointError
from tests.drafts import draft_config

TARGET = {
    "hidden_size": 64,
    "num_hidden_layers": 40,
    "vocab_size": 1000,
    "max_position_embeddings": 262144,
}


def parse(**overrides) -> DraftConfig:
    return DraftConfig.from_dict(draft_config(TARGET, **overrides))


def test_plain():
    config = parse()
    assert config.block_size == 8
    assert config.slots == 7
    assert config.target_layer_ids == (0, 20, 39)
    assert config.mask_token_id == 999
    assert config.windows == (0, 0)
    assert config.causal == (False, False)
    assert (config.input_embedding_scale, config.output_multiplier) == (1.0, 1.0)
    assert config.final_logit_softcapping == 0.0
    assert config.num_target_layers == 40


def test_block_size_at_the_top_inside_or_absent():
    assert parse(block_size=12).block_size == 12
    assert parse(block_size=None, dflash={"block_size": 5}).block_size == 5
    assert parse(block_size=12, dflash={"block_size": 5}).block_size == 5  # as z-lab reads it
    assert parse(block_size=None).block_size == 16
    assert parse(dflash={"runtime_block_size": 4}).block_size == 8


def test_keys_at_the_top_level_instead_of_dflash_config():
    raw = draft_config(TARGET)
    own = raw.pop("dflash_config")
    assert DraftConfig.from_dict({**raw, **own}) == DraftConfig.from_dict(draft_config(TARGET))


def test_rope_spellings_agree():
    scaling = {"factor": 64.0, "original_max_position_embeddings": 4096}
    old = parse(rope_theta=1e7, rope_scaling={"type": "yarn", **scaling})
    new = parse(
        rope_theta=None,
        rope_parameters={"rope_type": "yarn", "rope_theta": 1e7, **scaling},
    )
    assert old == new
    assert old.rope.rope_type == "yarn"
    assert old.rope.attention_scale() == pytest.approx(1.41589, abs=5e-6)


@pytest.mark.parametrize(
    ("layers", "count", "ids"),
    [  # as published with the drafts that name theirs
        (36, 5, (1, 9, 17, 25, 33)),
        (32, 5, (1, 8, 15, 22, 29)),
        (40, 5, (1, 10, 19, 28, 37)),
        (40, 8, (1, 6, 11, 16, 22, 27, 32, 37)),
        (64, 5, (1, 16, 31, 46, 61)),
        (24, 1, (12,)),
    ],
)
def test_default_target_layer_ids(layers, count, ids):
    assert default_target_layer_ids(layers, count) == ids
    config = parse(
        num_hidden_layers=count, num_target_layers=layers, dflash={"target_layer_ids": None}
    )
    assert config.target_layer_ids == ids


SLIDING = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 2048,
    "use_sliding_window": True,
}


@pytest.mark.parametrize(
    ("extra", "causal"),
    [
        ({}, (True, True, False)),  # the published habit
        ({"is_causal": False}, (False,) * 3),
        ({"is_causal": True}, (True,) * 3),
        ({"dflash": {"causal": False}}, (False,) * 3),
        ({"dflash": {"causal": True}}, (True,) * 3),
        ({"is_causal": False, "dflash": {"causal": True}}, (False,) * 3),
    ],
)
def test_causal_rule(extra, causal):
    config = parse(**SLIDING, **extra)
    assert config.windows == (2048, 2048, 0)
    assert config.causal == causal


def test_window_spellings():
    assert parse(dflash={"use_swa": True, "swa_window_size": 512}).windows == (512, 512)
    types = ["full_attention", "sliding_attention"]
    assert parse(layer_types=types, dflash={"swa_window_size": 512}).windows == (0, 512)
    assert parse(layer_types=types, sliding_window=16).windows == (0, 16)
    # Qwen3's own rule where no layer types are listed
    some = parse(use_sliding_window=True, sliding_window=16, max_window_layers=1)
    assert some.windows == (0, 16)
    assert parse(sliding_window=16, use_sliding_window=False).windows == (0, 0)


def test_multipliers_and_softcap():
    config = parse(
        final_logit_softcapping=30.0,
        dflash={"input_embedding_scale": 2, "output_multiplier": 0.5},
    )
    assert config.input_embedding_scale == 2.0
    assert config.output_multiplier == 0.5
    assert config.final_logit_softcapping == 30.0
    assert parse(final_logit_softcapping=0).final_logit_softcapping == 0.0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"architectures": ["DFlash2DraftModel"]}, "DFlash 2"),
        ({"dflash": {"conv_kernel_size": 2, "selector_rank": 256}}, "conv_kernel_size"),
        ({"dflash": {"attention_sink_bias": True}}, "attention_sink_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": "llama"}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": 3}, "3 attention heads"),
        ({"block_size": 1}, "block_size"),
        ({"dflash": {"mask_token_id": None}}, "mask_token_id"),
        ({"dflash": {"mask_token_id": 1000}}, "mask_token_id"),
        ({"dflash": {"mask_token_id": -1}}, "mask_token_id"),
        ({"dflash": {"target_layer_ids": []}}, "target_layer_ids"),
        ({"dflash": {"target_layer_ids": [1, -2]}}, "target_layer_ids"),
        ({"dflash": {"target_layer_ids": [1, 2.5]}}, "target_layer_ids"),
        ({"num_target_layers": None, "dflash": {"target_layer_ids": None}}, "num_target_layers"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "mamba"]}, "mamba"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "window"),
        ({**SLIDING, "use_sliding_window": False}, "use_sliding_window"),
        ({**SLIDING, "dflash": {"swa_window_size": 3}}, "window"),
        ({"is_causal": "yes"}, "is_causal"),
        ({"final_logit_softcapping": -1}, "final_logit_softcapping"),
        ({"dflash": {"output_multiplier": 0}}, "output_multiplier"),
        ({"dflash": {"input_embedding_scale": float("nan")}}, "input_embedding_scale"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_scaling": {"type": "longrope"}}, "longrope"),
    ],
)
def test_refusals_name_the_file_and_the_key(overrides, words):
    raw = draft_config(TARGET, **overrides)
    with pytest.raises(CheckpointError, match=words) as caught:
        DraftConfig.from_dict(raw, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ")


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(CheckpointError, match="not a DFlash draft"):
        DraftConfig.from_dict({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"})
    with pytest.raises(CheckpointError, match="dflash_config"):
        DraftConfig.from_dict({"dflash_config": [1]})
