"""What is read from config.json and from the tensors' names and shapes, and what is refused."""

import json
import re

import mlx.core as mx
import pytest

from specdec.checkpoint import Checkpoint
from specdec.errors import CheckpointError
from specdec.load import Settings, plan_for
from specdec.target.config import FULL, LINEAR, TargetConfig
from specdec.target.expert_store import ExpertStore
from tests.backends import REFERENCE
from tests.checkpoints import FAMILIES, tiny_config, write_checkpoint
from tests.targets import load_target, opened, rewrite

HYBRIDS = ("qwen3_next", "qwen3_5_moe")


def parse(raw: dict) -> TargetConfig:
    return TargetConfig.from_dict(raw, "folder/config.json")


def text_of(raw: dict) -> dict:
    return raw.get("text_config", raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_model_flat_and_nested(family):
    flat, nested = (parse(tiny_config(family, nested=nested)) for nested in (False, True))
    assert flat == nested
    assert flat.family == family
    assert (flat.hidden_size, flat.num_layers, flat.vocab_size) == (64, 4, 320)
    assert (flat.num_heads, flat.num_kv_heads, flat.head_dim) == (4, 2, 32)
    assert (flat.num_experts, flat.top_k, flat.moe_intermediate_size) == (8, 2, 64)
    assert flat.moe_layers == (0, 1, 2, 3)
    assert flat.max_position == 4096
    assert not flat.tie_word_embeddings


def test_what_the_families_differ_in():
    plain, *hybrids = (parse(tiny_config(family)) for family in FAMILIES)
    assert plain.layer_types == (FULL,) * 4
    assert plain.gdn is None
    assert plain.shared_intermediate_size == 0
    assert not plain.attn_output_gate
    assert plain.rope.dim == 32
    for config in hybrids:
        assert config.layer_types == (LINEAR, LINEAR, LINEAR, FULL)
        assert config.full_layers == (3,)
        assert config.linear_layers == (0, 1, 2)
        assert config.gdn is not None
        assert config.gdn.conv_channels == 2 * 2 * 16 + 4 * 32
        assert config.shared_intermediate_size == 64
        assert config.attn_output_gate
        assert config.rope.dim == 8  # a quarter of a head
    assert hybrids[1].prefix == "language_model.model."


@pytest.mark.parametrize("family", HYBRIDS)
def test_layer_types_follow_from_the_interval_where_they_are_not_listed(family):
    raw = tiny_config(family, full_attention_interval=2)
    listed = parse(raw)
    del text_of(raw)["layer_types"]
    assert parse(raw) == listed
    assert listed.layer_types == (LINEAR, FULL) * 2


def test_qwen3_5_always_normalizes_and_the_others_say():
    raw = tiny_config("qwen3_5_moe")
    text_of(raw).pop("norm_topk_prob", None)
    assert parse(raw).norm_topk_prob
    for family in ("qwen3_moe", "qwen3_next"):
        for value in (True, False):
            assert parse(tiny_config(family, norm_topk_prob=value)).norm_topk_prob == value


def test_dense_layers():
    raw = tiny_config("qwen3_moe", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert parse(raw).dense_layers == {0, 2, 3, 4}
    assert parse(raw).moe_layers == (1, 5)


@pytest.mark.parametrize(
    "model_type", [None, "llama", "qwen3", "qwen2_moe", "qwen3_5_moe_vision", ["qwen3_moe"]]
)
def test_an_unknown_model_type_is_refused(model_type):
    raw = tiny_config("qwen3_moe")
    raw["model_type"] = model_type
    with pytest.raises(CheckpointError, match=r"folder/config\.json: unknown model_type") as caught:
        parse(raw)
    assert repr(model_type) in str(caught.value)
    assert "qwen3_next" in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_size", "num_experts", "vocab_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [0, -1, "64", 64.0, True, None])
def test_sizes_must_be_positive_integers(key, value):
    raw = tiny_config("qwen3_moe")
    raw[key] = value
    with pytest.raises(CheckpointError, match=rf"folder/config\.json: .*{key}"):
        parse(raw)


BAD = {
    "num_key_value_heads": (3, "4 attention heads do not divide among 3 kv heads"),
    "num_experts_per_tok": (9, "num_experts_per_tok = 9 exceeds num_experts = 8"),
    "linear_num_value_heads": (3, "linear_num_value_heads = 3 is no multiple"),
    "linear_conv_kernel_dim": (1, "linear_conv_kernel_dim = 1"),
    "layer_types": (["full_attention"], "layer_types must list 4 times"),
    "num_hidden_layers": (3, "layer_types must list 3 times"),
    "attention_bias": (True, "attention_bias"),
    "use_sliding_window": (True, "use_sliding_window = true"),
    "hidden_act": ("gelu", "hidden_act = 'gelu'"),
    "tie_word_embeddings": ("yes", "tie_word_embeddings = 'yes'"),
    "rms_norm_eps": ("small", "rms_norm_eps"),
    "mlp_only_layers": ("all", "mlp_only_layers"),
    "partial_rotary_factor": (0.0, "partial_rotary_factor"),
    "rope_scaling": ({"rope_type": "spiral", "factor": 2.0}, "spiral"),
}


@pytest.mark.parametrize("key", BAD)
def test_bad_values_are_refused_by_name(key):
    value, words = BAD[key]
    raw = tiny_config("qwen3_next")
    raw[key] = value
    with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
        parse(raw)
    assert str(caught.value).startswith("folder/config.json: ")


def test_sliding_layers_are_not_run_as_full_ones():
    raw = tiny_config("qwen3_moe")
    raw["layer_types"] = ["full_attention"] * 3 + ["sliding_attention"]
    with pytest.raises(CheckpointError, match="layer_types must list 4 times 'full_attention'"):
        parse(raw)


def test_text_config_must_be_an_object():
    with pytest.raises(CheckpointError, match="text_config"):
        parse({"model_type": "qwen3_5_moe", "text_config": [1]})


def rename(folder, old: str, new: str) -> None:
    rewrite(folder, lambda tensors: {k.replace(old, new): v for k, v in tensors.items()})


def test_prefixes_are_read_off_the_tensors(tmp_path):
    folder = write_checkpoint(tmp_path, "qwen3_5_moe", quantize=None)
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("model.language_model.", "model."),
    ):
        rename(folder, old, new)
        rename(folder, "language_model.lm_head", "lm_head")
        with Checkpoint.open(folder) as checkpoint:
            config = TargetConfig.of(checkpoint)
        assert (config.prefix, config.head_prefix) == (new, "")
        with opened(folder, REFERENCE) as target:
            assert target.prefill([1, 2]).logits.shape == (1, 320)


def test_a_checkpoint_without_an_embedding_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path, "qwen3_moe", quantize=None)
    rename(folder, "model.embed_tokens", "model.embedding")
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(CheckpointError, match=r"no embed_tokens\.weight"),
    ):
        TargetConfig.of(checkpoint)


@pytest.mark.parametrize("stacked", [False, True])
def test_the_layout_of_transformers_is_refused_with_words(stacked, tmp_path):
    """Experts one by one, or stacked with gate and up in one tensor."""
    folder = write_checkpoint(tmp_path, "qwen3_moe", quantize=None)

    def change(tensors):
        out = {}
        for name, value in tensors.items():
            if ".switch_mlp." not in name:
                out[name] = value
            elif stacked and ".up_proj" in name:
                at = name.replace("switch_mlp.up_proj.weight", "experts.gate_up_proj")
                out[at] = mx.concatenate([value, value], axis=1)
            elif stacked and ".down_proj" in name:
                out[name.replace("switch_mlp.down_proj.weight", "experts.down_proj")] = value
            elif not stacked:
                for expert in range(value.shape[0]):
                    out[name.replace("switch_mlp", f"experts.{expert}")] = value[expert]
        return out

    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=r"mlx_lm\.convert") as caught:
        load_target(folder, REFERENCE)
    assert str(folder) in str(caught.value)


# a tensor of each kind a hybrid has, with the shape it must have
SHAPES = {
    "language_model.model.embed_tokens.weight": (320, 64),
    "language_model.lm_head.weight": (320, 64),
    "language_model.model.norm.weight": (64,),
    "language_model.model.layers.0.input_layernorm.weight": (64,),
    "language_model.model.layers.3.self_attn.q_proj.weight": (256, 64),
    "language_model.model.layers.3.self_attn.k_norm.weight": (32,),
    "language_model.model.layers.1.linear_attn.in_proj_qkv.weight": (192, 64),
    "language_model.model.layers.1.linear_attn.conv1d.weight": (192, 4, 1),
    "language_model.model.layers.1.linear_attn.A_log": (4,),
    "language_model.model.layers.1.linear_attn.norm.weight": (32,),
    "language_model.model.layers.2.mlp.gate.weight": (8, 64),
    "language_model.model.layers.2.mlp.shared_expert.down_proj.weight": (64, 64),
    "language_model.model.layers.2.mlp.shared_expert_gate.weight": (1, 64),
    "language_model.model.layers.2.mlp.switch_mlp.up_proj.weight": (8, 64, 64),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_missing_tensor_is_named(name, tmp_path):
    folder = write_checkpoint(tmp_path, "qwen3_5_moe", quantize=None)
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(CheckpointError) as caught:
        load_target(folder, REFERENCE)
    assert str(folder) in str(caught.value)
    assert name.removeprefix("language_model.model.") in str(caught.value)


@pytest.mark.parametrize("name", SHAPES)
def test_a_misshapen_tensor_is_named_with_both_shapes(name, tmp_path):
    folder = write_checkpoint(tmp_path, "qwen3_5_moe", quantize=None)
    good = SHAPES[name]
    bad = (good[0] + 1, *good[1:])
    rewrite(folder, lambda tensors: {**tensors, name: mx.zeros(bad, mx.bfloat16)})
    with pytest.raises(CheckpointError) as caught:
        load_target(folder, REFERENCE)
    for words in ("model.safetensors", name, str(list(good)), str(list(bad))):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "layers.4.input_layernorm.weight",
        "layers.3.self_attn.q_proj.bias",
        "layers.3.self_attn.sinks",
        "layers.1.linear_attn.in_proj_qkvz.scales",
    ],
)
def test_a_tensor_the_forward_pass_would_not_use_is_refused(name, tmp_path):
    """A model with something more than its config says would run, and run wrong."""
    folder = write_checkpoint(tmp_path, "qwen3_5_moe", extras=True)
    load_target(folder, REFERENCE)
    more = {f"language_model.model.{name}": mx.zeros((64,), mx.bfloat16)}
    rewrite(folder, lambda tensors: tensors | more)
    with pytest.raises(CheckpointError, match=rf"1 tensors are no part.*{re.escape(name)}"):
        load_target(folder, REFERENCE)


def test_a_broken_checkpoint_is_refused_before_the_plan(tmp_path):
    folder = write_checkpoint(tmp_path, "qwen3_moe")
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if "lm_head" not in k})
    with pytest.raises(CheckpointError, match="lm_head"):
        plan_for(Settings(model=str(folder)))


@pytest.mark.parametrize("name", SHAPES)
def test_integers_for_floats_are_refused(name, tmp_path):
    folder = write_checkpoint(tmp_path, "qwen3_5_moe", quantize=None)
    rewrite(folder, lambda tensors: {**tensors, name: mx.zeros(SHAPES[name], mx.uint32)})
    with pytest.raises(CheckpointError, match="U32") as caught:
        load_target(folder, REFERENCE)
    assert name in str(caught.value)


def test_experts_of_another_shape_are_found_before_anything_is_read(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, "qwen3_moe")
    raw = json.loads((folder / "config.json").read_text())
    raw["num_experts"] = 9
    (folder / "config.json").write_text(json.dumps(raw))
    with Checkpoint.open(folder) as checkpoint:
        monkeypatch.setattr("specdec.checkpoint.read_at", None)
        with pytest.raises(CheckpointError, match=r"switch_mlp.*\[8, .*expected \[9, "):
            ExpertStore(checkpoint, TargetConfig.of(checkpoint))
