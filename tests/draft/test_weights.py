"""Loading a draft: names, shapes, packing, and what is refused before anything is read."""

import json

import mlx.core as mx
import numpy as np
import pytest

from specdec import checkpoint as checkpoint_module
from specdec.checkpoint import Checkpoint
from specdec.draft.config import DraftConfig
from specdec.draft.weights import DraftWeights, weight_bytes
from specdec.errors import CheckpointError
from specdec.kernels.array import Backend
from tests.draft.reference import MLX
from tests.drafts import draft_config, draft_tensors, write_draft

TARGET = {
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "vocab_size": 100,
    "max_position_embeddings": 4096,
}


def load(folder, backend=MLX) -> DraftWeights:
    with Checkpoint.open(folder) as checkpoint:
        return DraftWeights.load(checkpoint, DraftConfig.from_dict(checkpoint.config), backend)


def arrays(weights: DraftWeights) -> list[mx.array]:
    found = [weights.hidden_norm, weights.norm]
    parts = [weights.fc]
    for layer in weights.layers:
        found += [layer.input_norm, layer.q_norm, layer.k_norm, layer.post_norm]
        parts += [*layer.qkv.matrices, layer.o, *layer.gate_up.matrices, layer.down]
    for part in parts:
        found += [a for a in (part.data, part.scales, part.biases) if a is not None]
    return found


@pytest.mark.parametrize("prefix", ["", "model."])
def test_every_tensor_arrives_in_its_place(tmp_path, prefix):
    weights = load(write_draft(tmp_path, TARGET, dtype="float32", prefix=prefix))
    tensors = draft_tensors(draft_config(TARGET), 3)
    layer = weights.layers[1]
    for ours, name in (
        (weights.fc.data, "fc"),
        (weights.hidden_norm, "hidden_norm"),
        (weights.norm, "norm"),
        (layer.input_norm, "layers.1.input_layernorm"),
        (layer.post_norm, "layers.1.post_attention_layernorm"),
        (layer.qkv.weight(0).data, "layers.1.self_attn.q_proj"),
        (layer.qkv.weight(1).data, "layers.1.self_attn.k_proj"),
        (layer.qkv.weight(2).data, "layers.1.self_attn.v_proj"),
        (layer.o.data, "layers.1.self_attn.o_proj"),
        (layer.q_norm, "layers.1.self_attn.q_norm"),
        (layer.k_norm, "layers.1.self_attn.k_norm"),
        (layer.gate_up.weight(0).data, "layers.1.mlp.gate_proj"),
        (layer.gate_up.weight(1).data, "layers.1.mlp.up_proj"),
        (layer.down.data, "layers.1.mlp.down_proj"),
    ):
        np.testing.assert_array_equal(np.array(ours), tensors[f"{name}.weight"])


@pytest.mark.parametrize("quantize", [None, (4, 32), (8, 64)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_bytes_are_known_before_loading(tmp_path, quantize, dtype):
    write_draft(tmp_path, TARGET, quantize=quantize)
    with Checkpoint.open(tmp_path) as checkpoint:
        config = DraftConfig.from_dict(checkpoint.config)
        planned = weight_bytes(checkpoint, config, dtype)
    loaded = arrays(load(tmp_path, Backend("reference", dtype, "test")))
    assert planned == sum(array.nbytes for array in loaded)
    assert {array.dtype for array in loaded} <= {dtype, mx.uint32}


def test_embedding_and_head_of_the_draft_are_not_read(tmp_path):
    copies = {name: mx.zeros((100, 64)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    write_draft(tmp_path, TARGET, extra=copies)
    load(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "candidate_selector.predecessor_codebook",
        "layers.0.attention_conv.base_kernel",
        "layers.2.mlp.up_proj.weight",
        "layers.0.self_attn.q_proj.bias",
    ],
)
def test_tensors_that_belong_to_something_else_are_refused(tmp_path, name):
    write_draft(tmp_path, TARGET, extra={name: mx.zeros((4, 4))})
    with pytest.raises(CheckpointError, match=name):
        load(tmp_path)


def rewrite(folder, change):
    tensors = mx.load(str(folder / "model.safetensors"))
    assert isinstance(tensors, dict)
    change(tensors)
    mx.eval(list(tensors.values()))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("fc.weight", None, "fc.weight is missing"),
        ("fc.weight", mx.zeros((64, 128)), r"fc.weight .*\[64, 128\].*\[64, 192\]"),
        ("norm.weight", mx.zeros((32,)), r"norm.weight .*\[32\].*\[64\]"),
        ("layers.1.mlp.down_proj.weight", None, "layers.1.mlp.down_proj.weight is missing"),
        ("layers.0.self_attn.k_norm.weight", mx.zeros((64,)), r"k_norm.weight .*\[64\].*\[16\]"),
        ("layers.0.self_attn.k_proj.weight", mx.zeros((64, 64)), r"k_proj.weight .*\[32, 64\]"),
        ("hidden_norm.weight", mx.zeros((64,), mx.uint32), "hidden_norm.weight is U32"),
    ],
)
def test_broken_tensors_are_refused_before_any_is_read(tmp_path, monkeypatch, name, value, words):
    write_draft(tmp_path, TARGET)

    def change(tensors):
        tensors.pop(name)
        if value is not None:
            tensors[name] = value

    rewrite(tmp_path, change)
    reads = []
    read_at = checkpoint_module.read_at

    def counted(*args):
        reads.append(args)
        return read_at(*args)

    with Checkpoint.open(tmp_path) as checkpoint:
        config = DraftConfig.from_dict(checkpoint.config)
        monkeypatch.setattr(checkpoint_module, "read_at", counted)
        with pytest.raises(CheckpointError, match=words):
            DraftWeights.load(checkpoint, config, MLX)
    assert not reads


def test_packed_rows_are_checked(tmp_path):
    write_draft(tmp_path, TARGET, quantize=(4, 32))

    def change(tensors):
        for part in ("weight", "scales", "biases"):
            path = f"layers.0.self_attn.q_proj.{part}"
            tensors[path] = tensors[path][:32]

    rewrite(tmp_path, change)
    with pytest.raises(CheckpointError, match=r"q_proj.weight has 32 rows, expected 64"):
        load(tmp_path)


def test_packing_that_contradicts_the_config_is_refused(tmp_path):
    write_draft(tmp_path, TARGET, quantize=(4, 32))
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization"]["bits"] = 8
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"4 bits.*8 bits"):
        load(tmp_path)
