"""Checkpoints of a real geometry with random weights, for measurements: nothing is downloaded.

    python -m scripts.gpu.geometry FOLDER               # Qwen3.6-35B-A3B, 19.5 GB
    python -m scripts.gpu.geometry FOLDER --layers 4
    python -m scripts.gpu.geometry FOLDER --tiny        # some hundred kB

Laid out as mlx-community writes them: 4-bit weights in groups of 64, gates in 8 bits. Packed codes
are random bits; scales and biases are such that activations stay near 1 and routing is spread. No
tokenizer: load target and engine, or mlx-lm's model, by themselves.
"""

import argparse
import json
import math
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

BLOCK = 1 << 26  # bytes of random bits; tensors are cut out of them at random places
GROUP = 64


@dataclass(frozen=True)
class Geometry:
    """A qwen3_5_moe text model, named as its config.json names it."""

    hidden_size: int = 2048
    num_hidden_layers: int = 40
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    head_dim: int = 256
    vocab_size: int = 248320
    num_experts: int = 256
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    full_attention_interval: int = 4
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_conv_kernel_dim: int = 4

    @property
    def conv_channels(self) -> int:
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * keys + self.values

    @property
    def values(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def q_features(self) -> int:
        """Queries and their output gates."""
        return 2 * self.num_attention_heads * self.head_dim

    @property
    def kv_features(self) -> int:
        return self.num_key_value_heads * self.head_dim


REAL = Geometry()
TINY = Geometry(128, 4, 4, 2, 64, 640, 16, 4, 64, 64, 4, 2, 4, 64, 64, 4)


class Matrix(NamedTuple):
    """A packed matrix; gain: deviation of its values times the square root of its inputs."""

    path: str
    shape: tuple[int, ...]
    bits: int = 4
    gain: float = 1.0


class Floats(NamedTuple):
    """A tensor of floats as they are."""

    name: str
    values: np.ndarray  # float32
    dtype: str = "BF16"


def config_of(geometry: Geometry) -> dict[str, Any]:
    """Its config.json."""
    interval = geometry.full_attention_interval
    text: dict[str, Any] = {
        "model_type": "qwen3_5_moe_text",
        **asdict(geometry),
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
        "attn_output_gate": True,
        "intermediate_size": 4 * geometry.hidden_size,
        "eos_token_id": geometry.vocab_size - 1,
        "layer_types": [
            "linear_attention" if (layer + 1) % interval else "full_attention"
            for layer in range(geometry.num_hidden_layers)
        ],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
        },
    }
    packing: dict[str, Any] = {"group_size": GROUP, "bits": 4, "mode": "affine"}
    for layer in range(geometry.num_hidden_layers):
        for gate in ("gate", "shared_expert_gate"):
            path = f"language_model.model.layers.{layer}.mlp.{gate}"
            packing[path] = {"group_size": GROUP, "bits": 8}
    return {
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": False,
        "text_config": text,
        "quantization": packing,
        "quantization_config": packing,
    }


def tensors_of(geometry: Geometry, rng: np.random.Generator) -> list[list[Matrix | Floats]]:
    """What each file holds: the ends of the model, then one file per layer."""
    hidden, vocab = geometry.hidden_size, geometry.vocab_size
    ends: list[Matrix | Floats] = [
        Matrix("language_model.model.embed_tokens", (vocab, hidden), gain=8.0),
        Floats("language_model.model.norm.weight", _near_one(rng, hidden)),
        Matrix("language_model.lm_head", (vocab, hidden), gain=2.0),
    ]
    layers = range(geometry.num_hidden_layers)
    return [ends, *(list(_layer(geometry, layer, rng)) for layer in layers)]


def _layer(g: Geometry, layer: int, rng: np.random.Generator) -> Iterator[Matrix | Floats]:
    at, hidden = f"language_model.model.layers.{layer}", g.hidden_size
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield Floats(f"{at}.{norm}.weight", _near_one(rng, hidden))
    if (layer + 1) % g.full_attention_interval:
        yield from _linear_attention(g, f"{at}.linear_attn", rng)
    else:
        attn = f"{at}.self_attn"
        yield Matrix(f"{attn}.q_proj", (g.q_features, hidden))
        yield Matrix(f"{attn}.k_proj", (g.kv_features, hidden))
        yield Matrix(f"{attn}.v_proj", (g.kv_features, hidden))
        yield Matrix(f"{attn}.o_proj", (hidden, g.num_attention_heads * g.head_dim))
        yield Floats(f"{attn}.q_norm.weight", _near_one(rng, g.head_dim))
        yield Floats(f"{attn}.k_norm.weight", _near_one(rng, g.head_dim))
    mlp = f"{at}.mlp"
    yield Matrix(f"{mlp}.gate", (g.num_experts, hidden), 8, 2.0)
    yield Matrix(f"{mlp}.shared_expert_gate", (1, hidden), 8)
    for module, count, inner, gain in (
        ("switch_mlp", (g.num_experts,), g.moe_intermediate_size, 4.0),
        ("shared_expert", (), g.shared_expert_intermediate_size, 3.0),
    ):
        yield Matrix(f"{mlp}.{module}.gate_proj", (*count, inner, hidden))
        yield Matrix(f"{mlp}.{module}.up_proj", (*count, inner, hidden))
        yield Matrix(f"{mlp}.{module}.down_proj", (*count, hidden, inner), gain=gain)


def _linear_attention(g: Geometry, at: str, rng: np.random.Generator) -> Iterator[Matrix | Floats]:
    hidden, heads, taps = g.hidden_size, g.linear_num_value_heads, g.linear_conv_kernel_dim
    yield Matrix(f"{at}.in_proj_qkv", (g.conv_channels, hidden))
    yield Matrix(f"{at}.in_proj_z", (g.values, hidden))
    yield Matrix(f"{at}.in_proj_b", (heads, hidden))
    yield Matrix(f"{at}.in_proj_a", (heads, hidden))
    conv = rng.normal(0, taps**-0.5, (g.conv_channels, taps, 1)).astype(np.float32)
    yield Floats(f"{at}.conv1d.weight", conv)
    # as the family is initialised: A in [1, 16], softplus(dt_bias) log-uniform in [1e-3, 0.1]
    yield Floats(f"{at}.A_log", np.log(rng.uniform(1, 16, heads)).astype(np.float32), "F32")
    step = np.exp(rng.uniform(math.log(1e-3), math.log(0.1), heads))
    yield Floats(f"{at}.dt_bias", np.log(np.expm1(step)).astype(np.float32))
    yield Floats(f"{at}.norm.weight", _near_one(rng, g.linear_value_head_dim))
    yield Matrix(f"{at}.out_proj", (hidden, g.values))


def _near_one(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.normal(1, 0.1, size).astype(np.float32)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to bfloat16, as uint16."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


class _Writer:
    """Writes files; random bits, and scales with their biases, come from blocks drawn once."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = np.random.default_rng(seed)
        self.bits = memoryview(rng.bytes(BLOCK))
        spread = rng.uniform(0.7, 1.3, 1 << 20)
        self._spread = spread, -spread * rng.uniform(0.4, 0.6, 1 << 20)

    def write(self, path: Path, tensors: list[Matrix | Floats]) -> int:
        """One safetensors file; returns its bytes."""
        rng = np.random.default_rng([self.seed, *path.name.encode()])
        header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        parts: list[tuple[memoryview, int]] = []  # bytes to be repeated, how many of them
        end = 0
        for tensor in tensors:
            for name, dtype, shape, source, size in self._parts(tensor, rng):
                header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
                parts.append((source, size))
                end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb", buffering=0) as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for source, size in parts:
                while size:
                    done = file.write(source[: min(size, len(source))])
                    size -= done
                    if size and done < len(source):
                        source = memoryview(bytes(source[done:]) + bytes(source[:done]))
        return 8 + len(text) + end

    def _parts(
        self, tensor: Matrix | Floats, rng: np.random.Generator
    ) -> Iterator[tuple[str, str, list[int], memoryview, int]]:
        if isinstance(tensor, Floats):
            bf16 = tensor.dtype == "BF16"
            raw = (bfloat16(tensor.values) if bf16 else tensor.values).tobytes()
            yield tensor.name, tensor.dtype, list(tensor.values.shape), memoryview(raw), len(raw)
            return
        *outs, into = tensor.shape
        words, groups = into * tensor.bits // 32, into // GROUP
        size = math.prod(outs) * words * 4
        at = int(rng.integers(BLOCK // 8)) * 4
        yield f"{tensor.path}.weight", "U32", [*outs, words], self.bits[at:], size
        deviation = math.sqrt((4**tensor.bits - 1) / 12)  # of a random code
        scale = tensor.gain / deviation / math.sqrt(into)
        at = int(rng.integers(1 << 19))
        for name, spread, factor in (
            ("scales", self._spread[0], scale),
            ("biases", self._spread[1], scale * (2**tensor.bits - 1)),
        ):
            size = math.prod(outs) * groups * 2
            raw = bfloat16(spread[at:][: size // 2] * factor).tobytes()
            yield f"{tensor.path}.{name}", "BF16", [*outs, groups], memoryview(raw), size


def write_model(folder: Path, geometry: Geometry = REAL, seed: int = 0) -> Path:
    """Write config.json and one file per layer; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(geometry), indent=1))
    files = tensors_of(geometry, np.random.default_rng(seed))
    writer = _Writer(seed)
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    start = perf_counter()
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        sizes = list(pool.map(writer.write, [folder / name for name in names], files))
    weight_map = {
        name: file
        for file, tensors in zip(names, files, strict=True)
        for tensor in tensors
        for name in _names(tensor)
    }
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    seconds = perf_counter() - start
    print(f"{folder}: {sum(sizes) / 1e9:.2f} GB in {seconds:.1f} s", flush=True)
    return folder


def _names(tensor: Matrix | Floats) -> list[str]:
    if isinstance(tensor, Floats):
        return [tensor.name]
    return [f"{tensor.path}.{part}" for part in ("weight", "scales", "biases")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    geometry = TINY if args.tiny else REAL
    if args.layers:
        geometry = replace(geometry, num_hidden_layers=args.layers)
    write_model(args.folder, geometry)


if __name__ == "__main__":
    main()
