"""Tiny random checkpoints of the three families, in the layout mlx-community publishes.

`write_checkpoint` writes config.json and safetensors with MLX alone. Weights are scaled so that
activations stay near 1 and logits are spread, hence near-ties are rare. Every tensor is drawn from
its own stream (seed and name), so variants of one seed that differ only in layout (fused or
separate projections, shards, extras) hold the same numbers.

mlx-lm 0.32 loads every variant but these: declare=False; rope="parameters" or nested=True outside
qwen3_5_moe; fused=False or extras in qwen3_next; fused=True in qwen3_5_moe.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

FAMILIES = ("qwen3_moe", "qwen3_next", "qwen3_5_moe")
# (bits, group size), or None for a dense weight
Packing = tuple[int, int] | None

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 320,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
HYBRID = {
    "full_attention_interval": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "shared_expert_intermediate_size": 64,
}


def tiny_config(
    family: str,
    *,
    rope: str | None = None,
    rope_theta: float = 10000.0,
    rope_scaling: Mapping[str, Any] | None = None,
    nested: bool | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """The config.json of a family, without its quantization.

    rope: "flat" writes rope_theta, partial_rotary_factor and rope_scaling at the top, "parameters"
        writes one rope_parameters object; qwen3_5_moe defaults to the latter.
    nested: wrap all of it in text_config, as qwen3_5_moe does by default.
    overrides: any other key of the config.
    """
    hybrid = family != "qwen3_moe"
    modern = family == "qwen3_5_moe"
    text: dict[str, Any] = {**COMMON, **(HYBRID if hybrid else {}), **overrides}
    if modern:
        del text["decoder_sparse_step"], text["mlp_only_layers"]
    if hybrid:
        interval = text["full_attention_interval"]
        text["layer_types"] = [
            "linear_attention" if (layer + 1) % interval else "full_attention"
            for layer in range(text["num_hidden_layers"])
        ]
    if (rope or ("parameters" if modern else "flat")) == "parameters":
        text["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": rope_theta,
            **({"partial_rotary_factor": 0.25} if hybrid else {}),
            **(rope_scaling or {}),
        }
        if modern and rope_scaling is None:
            text["rope_parameters"] |= {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
    else:
        text["rope_theta"] = rope_theta
        text["rope_scaling"] = dict(rope_scaling) if rope_scaling else None
        if hybrid:
            text["partial_rotary_factor"] = 0.25
    text["eos_token_id"] = overrides.get("eos_token_id", text["vocab_size"] - 1)
    if nested if nested is not None else modern:
        return {
            "model_type": family,
            "tie_word_embeddings": text["tie_word_embeddings"],
            "text_config": {"model_type": f"{family}_text", **text},
        }
    return {"model_type": family, **text}


def write_checkpoint(
    folder: Path,
    family: str,
    *,
    quantize: Packing = (4, 32),
    gates: Packing = (8, 64),
    mixed: Mapping[str, Packing] | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
    shards: int = 1,
    fused: bool | None = None,
    extras: bool = False,
    declare: bool = True,
    **config: Any,
) -> Path:
    """Write a checkpoint and return its folder.

    quantize: (bits, group size) of everything but the gates; None writes a dense checkpoint.
        A module whose inputs the group size does not divide stays dense.
    gates: packing of mlp.gate and mlp.shared_expert_gate (ignored when `quantize` is None).
    mixed: packing by the end of a module's path, {"layers.1.linear_attn.in_proj_a": (8, 32)};
        the longest match wins over `quantize` and `gates`.
    dtype: of everything that is not packed ("bfloat16", "float16", "float32").
    shards: files to spread the tensors over; more than one brings an index.
    fused: in_proj_qkvz and in_proj_ba (default for qwen3_next) instead of separate projections.
    extras: tensors of a vision tower and of a multi-token head, which a text loader skips.
    declare: write the entry "quantization" into the config; without it only shapes tell.
    config: keywords of `tiny_config`.
    """
    raw = tiny_config(family, **config)
    text = raw.get("text_config", raw)
    float_dtype = getattr(mx, dtype)
    wrapper = "language_model." if family == "qwen3_5_moe" else ""
    declared: dict[str, Any] = {}
    tensors: dict[str, mx.array] = {}
    for name, values in _modules(text, seed, family == "qwen3_next" if fused is None else fused):
        full = wrapper + name
        path = full.removesuffix(".weight")
        matrix = full.endswith(".weight") and values.ndim >= 2 and not path.endswith("conv1d")
        packing = _packing(path, quantize, gates, mixed or {}) if matrix else None
        if packing and values.shape[-1] % packing[1]:
            packing = None
        # A_log stays in float32 where converters of the family keep it there.
        keep = full.endswith("A_log") and family == "qwen3_5_moe"
        weight = mx.array(values).astype(mx.float32 if keep else float_dtype)
        if packing is None:
            tensors[full] = weight
            if matrix and quantize:
                declared[path] = False
            continue
        bits, group_size = packing
        weight, scales, biases = mx.quantize(weight, group_size=group_size, bits=bits)
        tensors |= {full: weight, f"{path}.scales": scales, f"{path}.biases": biases}
        if packing != quantize:
            declared[path] = {"group_size": group_size, "bits": bits}
    if extras:
        tensors["vision_tower.blocks.0.attn.proj.weight"] = mx.ones((8, 8), float_dtype)
        tensors[f"{wrapper}mtp.fc.weight"] = mx.ones((8, 16), float_dtype)
    if quantize and declare:
        bits, group_size = quantize
        raw["quantization"] = {"group_size": group_size, "bits": bits, "mode": "affine"} | declared
        raw["quantization_config"] = raw["quantization"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    _save(folder, tensors, shards)
    return folder


def write_tokenizer(folder: Path, vocab_size: int = 320) -> Path:
    """Write a byte-level BPE tokenizer.json with a chat template, of exactly `vocab_size` ids.

    Ids 0..255 are the bytes, the last three <|endoftext|>, <|im_start|> and <|im_end|> (the end of
    a turn, `eos_token_id` of `tiny_config`); between them stand merged pairs of letters.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)}
    merges = []
    pairs = (a + b for a in "etaoinshrdlu" for b in "etaoinshrdluy")
    assert 0 <= vocab_size - 3 - len(vocab) <= 12 * 13, vocab_size
    while len(vocab) < vocab_size - 3:
        pair = next(pairs)
        merges.append((pair[0], pair[1]))
        vocab[pair] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(special, special=True) for special in specials])
    assert tokenizer.get_vocab_size() == vocab_size
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return folder


def _packing(path: str, quantize: Packing, gates: Packing, mixed: Mapping[str, Packing]) -> Packing:
    matches = [end for end in mixed if path.endswith(end)]
    if matches:
        return mixed[max(matches, key=len)]
    if quantize and path.endswith(("mlp.gate", "shared_expert_gate")):
        return gates
    return quantize


def _modules(text: dict[str, Any], seed: int, fused: bool) -> Iterator[tuple[str, np.ndarray]]:
    """(name without wrapper, float32 values) of every tensor, in file order."""

    def normal(name: str, *shape: int, scale: float = 1.0) -> np.ndarray:
        """Normal values with deviation scale / sqrt(inputs)."""
        return _stream(seed, name).normal(0, scale / np.sqrt(shape[-1]), shape).astype(np.float32)

    def linear(name: str, *shape: int, scale: float = 1.0) -> tuple[str, np.ndarray]:
        return f"{name}.weight", normal(name, *shape, scale=scale)

    def norm(name: str, size: int) -> tuple[str, np.ndarray]:
        values = _stream(seed, name).normal(1, 0.1, size)
        return f"{name}.weight", values.astype(np.float32)

    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    heads, kv_heads, dim = (
        text["num_attention_heads"],
        text["num_key_value_heads"],
        text["head_dim"],
    )
    hybrid = "linear_num_key_heads" in text
    tied = text["tie_word_embeddings"]
    # Small tied embeddings: large ones would make every token predict itself.
    yield linear("model.embed_tokens", text["vocab_size"], hidden, scale=2.0 if tied else 8.0)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        yield norm(f"{at}.input_layernorm", hidden)
        if hybrid and (layer + 1) % text["full_attention_interval"]:
            yield from _linear_attention(f"{at}.linear_attn", text, seed, fused, normal, norm)
        else:
            attn = f"{at}.self_attn"
            yield linear(f"{attn}.q_proj", heads * dim * (2 if hybrid else 1), hidden)
            yield linear(f"{attn}.k_proj", kv_heads * dim, hidden)
            yield linear(f"{attn}.v_proj", kv_heads * dim, hidden)
            yield linear(f"{attn}.o_proj", hidden, heads * dim)
            yield norm(f"{attn}.q_norm", dim)
            yield norm(f"{attn}.k_norm", dim)
        yield norm(f"{at}.post_attention_layernorm", hidden)
        mlp = f"{at}.mlp"
        if layer in text.get("mlp_only_layers", ()) or (layer + 1) % text.get(
            "decoder_sparse_step", 1
        ):
            inner = text["intermediate_size"]
            yield linear(f"{mlp}.gate_proj", inner, hidden)
            yield linear(f"{mlp}.up_proj", inner, hidden)
            yield linear(f"{mlp}.down_proj", hidden, inner, scale=3.0)
            continue
        experts, inner = text["num_experts"], text["moe_intermediate_size"]
        yield linear(f"{mlp}.gate", experts, hidden, scale=2.0)
        yield linear(f"{mlp}.switch_mlp.gate_proj", experts, inner, hidden)
        yield linear(f"{mlp}.switch_mlp.up_proj", experts, inner, hidden)
        yield linear(f"{mlp}.switch_mlp.down_proj", experts, hidden, inner, scale=4.0)
        if hybrid:
            inner = text["shared_expert_intermediate_size"]
            yield linear(f"{mlp}.shared_expert.gate_proj", inner, hidden)
            yield linear(f"{mlp}.shared_expert.up_proj", inner, hidden)
            yield linear(f"{mlp}.shared_expert.down_proj", hidden, inner, scale=3.0)
            yield linear(f"{mlp}.shared_expert_gate", 1, hidden)
    yield norm("model.norm", hidden)
    if not tied:
        yield linear("lm_head", text["vocab_size"], hidden, scale=2.0)


def _linear_attention(
    at: str, text: dict[str, Any], seed: int, fused: bool, normal: Any, norm: Any
) -> Iterator[tuple[str, np.ndarray]]:
    hidden, nk, nv = (
        text["hidden_size"],
        text["linear_num_key_heads"],
        text["linear_num_value_heads"],
    )
    dk, dv = text["linear_key_head_dim"], text["linear_value_head_dim"]
    channels = 2 * nk * dk + nv * dv
    q = normal(f"{at}.q", nk * dk, hidden)
    k = normal(f"{at}.k", nk * dk, hidden)
    v = normal(f"{at}.v", nv * dv, hidden)
    z = normal(f"{at}.z", nv * dv, hidden)
    b = normal(f"{at}.b", nv, hidden)
    a = normal(f"{at}.a", nv, hidden)
    if fused:
        # Interleaved per key head: its q, k, v rows and z rows; its b rows and a rows.
        by_head = [rows.reshape(nk, -1, hidden) for rows in (q, k, v, z)]
        yield f"{at}.in_proj_qkvz.weight", np.concatenate(by_head, 1).reshape(-1, hidden)
        by_head = [rows.reshape(nk, -1, hidden) for rows in (b, a)]
        yield f"{at}.in_proj_ba.weight", np.concatenate(by_head, 1).reshape(-1, hidden)
    else:
        yield f"{at}.in_proj_qkv.weight", np.concatenate((q, k, v))
        yield f"{at}.in_proj_z.weight", z
        yield f"{at}.in_proj_b.weight", b
        yield f"{at}.in_proj_a.weight", a
    kernel = text["linear_conv_kernel_dim"]
    yield f"{at}.conv1d.weight", normal(f"{at}.conv1d", channels, kernel)[..., None]
    stream = _stream(seed, f"{at}.decay")
    # As the families are initialised: A in [1, 16], softplus(dt_bias) log-uniform in [1e-3, 0.1].
    yield f"{at}.A_log", np.log(stream.uniform(1, 16, nv)).astype(np.float32)
    step = np.exp(stream.uniform(np.log(1e-3), np.log(0.1), nv))
    yield f"{at}.dt_bias", np.log(np.expm1(step)).astype(np.float32)
    yield norm(f"{at}.norm", dv)
    yield f"{at}.out_proj.weight", normal(f"{at}.out_proj", hidden, nv * dv)


def _stream(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def _save(folder: Path, tensors: dict[str, mx.array], shards: int) -> None:
    names = list(tensors)
    metadata = {"format": "mlx"}
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata)
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        # Strided, so that neighbours in a module lie in different files.
        part = {name: tensors[name] for name in names[shard::shards]}
        mx.save_safetensors(str(folder / file), part, metadata)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({**index, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
    )
