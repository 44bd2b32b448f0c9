"""Logits of the three families against mlx-lm on the very same files, in float32."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.backends import CPU, REFERENCE, each_backend
from tests.checkpoints import FAMILIES, write_checkpoint
from tests.targets import logits_of, opened, step

mlx_lm = pytest.importorskip("mlx_lm.utils")

VOCAB = 320
PROMPT = np.random.default_rng(7).integers(0, VOCAB, 100).tolist()
HYBRIDS = ("qwen3_next", "qwen3_5_moe")

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{family}-4bit": (family, {}) for family in FAMILIES},
    **{f"{family}-dense": (family, {"quantize": None}) for family in FAMILIES},
    **{f"{family}-tied": (family, {"tie_word_embeddings": True}) for family in FAMILIES},
    **{
        f"{family}-{bits}bit": (family, {"quantize": (bits, group), "gates": (8, 32)})
        for family, bits, group in (
            ("qwen3_moe", 2, 32),
            ("qwen3_next", 3, 64),
            ("qwen3_5_moe", 5, 32),
            ("qwen3_moe", 6, 64),
            ("qwen3_5_moe", 8, 64),
        )
    },
    "a-and-b-differ": (
        "qwen3_5_moe",
        {
            "mixed": {
                "layers.1.linear_attn.in_proj_a": (8, 32),
                "layers.0.linear_attn.in_proj_b": (6, 32),
                "layers.2.linear_attn.in_proj_a": None,
            }
        },
    ),
    "mixed-experts": (
        "qwen3_next",
        {
            "mixed": {
                "layers.1.mlp.switch_mlp.down_proj": (8, 32),
                "layers.2.mlp.switch_mlp.up_proj": None,
                "layers.3.self_attn.v_proj": (6, 64),
                "shared_expert.down_proj": (5, 32),
                "embed_tokens": (8, 64),
                "lm_head": (6, 32),
            }
        },
    ),
    "float16": ("qwen3_moe", {"dtype": "float16"}),
    "unnormalized": ("qwen3_moe", {"norm_topk_prob": False}),
    "unnormalized-next": ("qwen3_next", {"norm_topk_prob": False, "quantize": None}),
    "dense-layers": ("qwen3_moe", {"mlp_only_layers": [0, 2]}),
    "sparse-step": ("qwen3_next", {"decoder_sparse_step": 2}),
    "odd-shapes": (
        "qwen3_moe",
        {
            "quantize": None,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 48,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "vocab_size": 333,
        },
    ),
    "one-key-head-each": (
        "qwen3_next",
        {"linear_num_value_heads": 2, "linear_value_head_dim": 48, "linear_conv_kernel_dim": 3},
    ),
}


def peer_logits(folder: Path, tokens: list[int], change=lambda model: None) -> np.ndarray:
    """mlx-lm's logits of every position, in float32."""
    model, _ = mlx_lm.load_model(folder)
    model.set_dtype(mx.float32)
    change(model)
    return np.array(model(mx.array([tokens]))[0])


def our_logits(folder: Path, backend, tokens: list[int], **options) -> np.ndarray:
    with opened(folder, backend, **options) as target:
        return logits_of(target.prefill(tokens, all_logits=True))


def agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-4
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()
    assert len(set(theirs.argmax(-1).tolist())) > 10  # the model is not a constant


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_mlx_lm(case, tmp_path):
    family, options = CASES[case]
    folder = write_checkpoint(tmp_path, family, **options)
    theirs = peer_logits(folder, PROMPT)
    for backend in (REFERENCE, pytest.importorskip("numba") and CPU):
        agree(our_logits(folder, backend, PROMPT), theirs)


@each_backend
@pytest.mark.parametrize("family", FAMILIES)
def test_decoded_logits_are_those_of_mlx_lm(family, tmp_path, backend):
    """A short prompt, then token by token; experts in few slots, so in many waves."""
    folder = write_checkpoint(tmp_path, family)
    theirs = peer_logits(folder, PROMPT)
    with opened(folder, backend, pins=1, slots=3) as target:
        first = logits_of(target.prefill(PROMPT[:5], all_logits=True))
        ours = np.concatenate([first, [step(target, token) for token in PROMPT[5:]]])
    agree(ours, theirs)


@each_backend
@pytest.mark.parametrize(
    "scaling",
    [YARN, {**YARN, "factor": 8.0, "beta_fast": 16.0}, {"rope_type": "linear", "factor": 4.0}],
)
def test_scaled_rope_against_mlx_lms_own(scaling, tmp_path, backend):
    """mlx-lm reads no scaling for qwen3_moe: its rope module is put into its model by hand."""
    from mlx_lm.models.rope_utils import initialize_rope

    folder = write_checkpoint(tmp_path, "qwen3_moe", rope_scaling=scaling, quantize=None)

    def with_scaling(model) -> None:
        for layer in model.layers:
            layer.self_attn.rope = initialize_rope(32, 10000.0, False, scaling, 4096)

    theirs = peer_logits(folder, PROMPT, with_scaling)
    ours = our_logits(folder, backend, PROMPT)
    agree(ours, theirs)
    assert np.abs(ours - peer_logits(folder, PROMPT)).max() > 0.1  # and it matters


def test_yarn_against_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = write_checkpoint(
        tmp_path, "qwen3_moe", rope_scaling=YARN, quantize=None, dtype="float32"
    )
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={**YARN, "rope_theta": 10000.0},
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    raw = mx.load(str(folder / "model.safetensors"))
    tensors = {
        name: torch.from_numpy(np.array(value).copy())
        for name, value in raw.items()  # type: ignore[union-attr]
    }
    for layer in range(4):
        at = f"model.layers.{layer}.mlp"
        gate, up, down = (
            tensors.pop(f"{at}.switch_mlp.{name}_proj.weight") for name in ("gate", "up", "down")
        )
        tensors[f"{at}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        tensors[f"{at}.experts.down_proj"] = down
    model.load_state_dict(tensors)
    with torch.no_grad():
        theirs = model(torch.tensor([PROMPT])).logits[0].numpy()
    agree(our_logits(folder, REFERENCE, PROMPT), theirs)


@each_backend
@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("quantize", [(4, 32), None])
def test_fused_and_separate_projections_are_the_same_model(family, quantize, tmp_path, backend):
    """Quantization is along a row, so reordering rows changes no bit."""
    logits = [
        our_logits(
            write_checkpoint(tmp_path / str(fused), family, fused=fused, quantize=quantize),
            backend,
            PROMPT,
        )
        for fused in (True, False)
    ]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)
    assert (logits[0].argmax(-1) == logits[1].argmax(-1)).all()


@each_backend
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_on_disk_are_the_same_model(family, tmp_path, backend):
    plain = our_logits(write_checkpoint(tmp_path / "plain", family), backend, PROMPT)
    variants: dict[str, dict[str, Any]] = {
        "shards": {"shards": 3},
        "extras": {"extras": True},
        "silent": {"declare": False},
        "nested": {"nested": family != "qwen3_5_moe"},
        "parameters": {"rope": "flat" if family == "qwen3_5_moe" else "parameters"},
    }
    for name, options in variants.items():
        folder = write_checkpoint(tmp_path / name, family, **options)
        assert np.array_equal(our_logits(folder, backend, PROMPT), plain), name


@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.parametrize("factor", [0.25, 0.5])
def test_partial_rotary_turns_that_part_of_a_head(family, factor, tmp_path):
    rope = {"partial_rotary_factor": factor}
    options: dict[str, Any] = (
        {"rope_scaling": rope} if family == "qwen3_5_moe" else {"partial_rotary_factor": factor}
    )
    folder = write_checkpoint(tmp_path, family, **options)
    agree(our_logits(folder, REFERENCE, PROMPT), peer_logits(folder, PROMPT))
