"""Rotary embedding: golden frequencies, config spellings, row invariance."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.errors import CheckpointError
from specdec.kernels.rope import Rope, RopeConfig, rotate

# name, head_dim, the whole rope part of config.json
YARN: dict[str, tuple[int, dict]] = {
    "draft-64": (
        128,
        {
            "rope_theta": 1e7,
            "max_position_embeddings": 262144,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 64.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        },
    ),
    "target-4": (
        128,
        {
            "rope_theta": 1000000,
            "max_position_embeddings": 40960,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            },
        },
    ),
    "untruncated": (
        64,
        {
            "max_position_embeddings": 131072,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "truncate": False,
            },
        },
    ),
    "mscale": (
        64,
        {
            "rope_theta": 10000.0,
            "max_position_embeddings": 163840,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 4096,
                "mscale": 1.0,
                "mscale_all_dim": 0.707,
            },
        },
    ),
    "explicit-factor": (
        96,
        {
            "rope_theta": 500000.0,
            "max_position_embeddings": 65536,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "attention_factor": 1.25,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
        },
    ),
    "partial": (
        256,
        {
            "max_position_embeddings": 262144,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.25,
                "factor": 2.0,
                "original_max_position_embeddings": 131072,
            },
        },
    ),
    "no-original": (
        128,
        {
            "rope_theta": 1e6,
            "max_position_embeddings": 16384,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        },
    ),
}


def formula(head_dim: int, config: dict) -> tuple[list[float], float]:
    """YaRN once more, pair by pair in plain Python, from the paper's formulas."""
    scaling = config.get("rope_scaling") or config["rope_parameters"]
    theta = scaling.get("rope_theta", config.get("rope_theta"))
    dim = int(head_dim * scaling.get("partial_rotary_factor", 1.0))
    length = scaling.get("original_max_position_embeddings", config["max_position_embeddings"])
    factor = scaling["factor"]

    def pair_turning(turns):  # the pair whose wavelength makes this many turns in `length`
        # length * theta**(-2 i / dim) / (2 pi) == turns, solved for i
        return dim / 2 * math.log(length / (2 * math.pi * turns), theta)

    low = pair_turning(scaling.get("beta_fast", 32))
    high = pair_turning(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    freqs = []
    for pair in range(dim // 2):
        plain = 1 / theta ** (2 * pair / dim)
        ramp = min(max((pair - low) / (high - low), 0), 1)
        freqs.append(plain * (1 - ramp) + plain / factor * ramp)
    if "attention_factor" in scaling:
        scale = scaling["attention_factor"]
    elif "mscale" in scaling:
        scale = (0.1 * scaling["mscale"] * math.log(factor) + 1) / (
            0.1 * scaling["mscale_all_dim"] * math.log(factor) + 1
        )
    else:
        scale = 0.1 * math.log(factor) + 1
    return freqs, scale


@pytest.mark.parametrize("name", YARN)
def test_yarn_follows_the_formulas(name):
    head_dim, config = YARN[name]
    rope = RopeConfig.from_config(config, head_dim)
    freqs, scale = formula(head_dim, config)
    assert rope.inv_freq().dtype == np.float64
    np.testing.assert_allclose(rope.inv_freq(), freqs, rtol=1e-12)
    assert rope.attention_scale() == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("name", YARN)
def test_yarn_agrees_with_transformers(name):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    head_dim, config = YARN[name]
    scaling = config.get("rope_scaling") or config["rope_parameters"]
    parameters = {key: value for key, value in scaling.items() if key != "type"}
    parameters |= {"rope_type": "yarn"}
    parameters.setdefault("rope_theta", config.get("rope_theta"))
    theirs = transformers.Qwen3Config(
        head_dim=head_dim,
        max_position_embeddings=config["max_position_embeddings"],
        rope_parameters=parameters,
    )
    freqs, scale = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    ours = RopeConfig.from_config(config, head_dim)
    np.testing.assert_allclose(ours.inv_freq(), freqs.numpy(), rtol=2e-6)  # theirs is float32
    assert ours.attention_scale() == pytest.approx(scale, rel=1e-6)


def test_golden_numbers_of_the_published_draft():
    """theta 1e7, dim 128, 4096 to 262144: wrong here means no accepted token at all."""
    head_dim, config = YARN["draft-64"]
    rope = RopeConfig.from_config(config, head_dim)
    assert rope.correction_range() == (11, 26)
    plain = RopeConfig(128, 1e7).inv_freq()
    divisor = plain / rope.inv_freq()
    assert int((divisor > 1 + 1e-12).sum()) == 52
    assert (divisor[:12] == 1).all()
    np.testing.assert_allclose(divisor[26:], 64, rtol=1e-12)
    for pair, expected in ((12, 1.07), (15, 1.36), (18, 1.85), (22, 3.60)):
        assert divisor[pair] == pytest.approx(expected, abs=0.006)
    assert rope.attention_scale() == pytest.approx(1.41589, abs=5e-6)
    assert rope.attention_scale() ** 2 == pytest.approx(2.0047, abs=5e-5)


def test_untruncated_range_is_fractional():
    head_dim, config = YARN["untruncated"]
    low, high = RopeConfig.from_config(config, head_dim).correction_range()
    assert low != int(low)
    assert high != int(high)


def test_default_and_linear():
    plain = 1e4 ** (-np.arange(0, 32, 2) / 32)
    default = RopeConfig.from_config({"rope_theta": 10000}, 32)
    np.testing.assert_allclose(default.inv_freq(), plain, rtol=1e-14)
    linear = RopeConfig.from_config(
        {"rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 4}}, 32
    )
    np.testing.assert_allclose(linear.inv_freq(), plain / 4, rtol=1e-14)
    assert default.attention_scale() == linear.attention_scale() == 1.0


def test_spellings_of_one_config_agree():
    scaling = {"factor": 8.0, "original_max_position_embeddings": 2048}
    old = {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **scaling}}
    older = {"rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", **scaling}}
    new = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **scaling}}
    per_layer = {
        "rope_parameters": dict.fromkeys(
            ("full_attention", "sliding_attention"), new["rope_parameters"]
        )
    }
    nested = {"text_config": new}
    beside = {**new, "partial_rotary_factor": 1.0, "rope_scaling": None}
    first, *others = (
        RopeConfig.from_config(c, 64) for c in (old, older, new, per_layer, nested, beside)
    )
    assert all(other == first for other in others)


def test_mrope_is_the_default_for_text():
    config = {
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        }
    }
    assert RopeConfig.from_config(config, 256) == RopeConfig(64, 1e7)
    old = {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    assert RopeConfig.from_config(old, 128) == RopeConfig(128, 1e6)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic"),
        ({"rope_scaling": None}, "rope_theta"),
        ({"rope_theta": "1e6"}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "yarn"}}, "original_max_position"),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": -2}}, "factor"),
        ({"rope_theta": 1e6, "partial_rotary_factor": 2.0}, "partial_rotary_factor"),
        ({"rope_theta": 1e6, "partial_rotary_factor": 0.05}, "partial_rotary_factor"),
        ({"rope_theta": 1e6, "rope_scaling": "yarn"}, "rope_scaling"),
        (
            {
                "rope_scaling": {"type": "yarn"},
                "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
            },
            "different types",
        ),
        (
            {"rope_parameters": {"a": {"rope_theta": 1e6}, "b": {"rope_theta": 1e4}}},
            "between layer types",
        ),
    ],
)
def test_refusals_name_what_is_wrong(config, words):
    with pytest.raises(CheckpointError, match=words):
        RopeConfig.from_config(config, 64)


def reference_rotation(x: np.ndarray, positions: np.ndarray, config: RopeConfig) -> np.ndarray:
    """Complex multiplication of the pairs, float64."""
    half = config.dim // 2
    z = x[..., :half] + 1j * x[..., half : config.dim]
    z = z * config.attention_scale() * np.exp(1j * positions[:, None] * config.inv_freq())
    return np.concatenate([z.real, z.imag, x[..., config.dim :]], axis=-1)


def turned(rope, x, positions):
    return rotate(x, *rope.rows(positions, x))


@pytest.mark.parametrize("name", ["draft-64", "partial", "mscale"])
def test_rotation_is_a_complex_product(name):
    head_dim, config = YARN[name]
    rope_config = RopeConfig.from_config(config, head_dim)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 5, head_dim))
    positions = np.array([0, 1, 255, 256, 5000])
    ours = np.array(turned(Rope(rope_config), mx.array(x.astype(np.float32)), positions))
    np.testing.assert_allclose(ours, reference_rotation(x, positions, rope_config), atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_row_depends_on_itself_alone(data):
    """Bitwise: other rows, their number, their order and what was asked before do not matter."""
    config = RopeConfig(16, 1e4, "yarn", 8.0, 64)
    rows = data.draw(st.integers(1, 20))
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, rows, 24)).astype(np.float32)
    positions = rng.integers(0, 1000, rows)
    together = np.array(turned(Rope(config), mx.array(x), positions))
    on_cpu = turned(Rope(config), x, positions)  # NumPy, where a fused product is rounded once
    np.testing.assert_allclose(on_cpu, together, atol=1e-6)
    alone = Rope(config)
    order = rng.permutation(rows)
    for row in order:
        one = np.array(turned(alone, mx.array(x[:, row : row + 1]), positions[row : row + 1]))
        np.testing.assert_array_equal(one, together[:, row : row + 1])
        one = turned(alone, np.ascontiguousarray(x[:, row : row + 1]), positions[row : row + 1])
        np.testing.assert_array_equal(one, on_cpu[:, row : row + 1])
    shuffled = np.array(turned(alone, mx.array(x[:, order]), positions[order]))
    np.testing.assert_array_equal(shuffled, together[:, order])


def test_dtype_is_kept_and_computed_in_float32():
    config = RopeConfig(8, 1e4)
    x = mx.random.normal((3, 8), key=mx.random.key(0)).astype(mx.bfloat16)
    positions = np.array([5, 6, 7])
    out = turned(Rope(config), x, positions)
    assert out.dtype == mx.bfloat16
    wide = turned(Rope(config), x.astype(mx.float32), positions).astype(mx.bfloat16)
    assert mx.array_equal(out, wide)
