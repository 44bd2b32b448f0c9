"""What a target checkpoint is made of: architecture in words, parts, their packing and size.

Reads headers only. Refuses what the engine would refuse: unknown families and broken packings.
"""

import math
from collections import Counter
from dataclasses import dataclass

from specdec.checkpoint import Checkpoint
from specdec.target.config import TargetConfig
from specdec.target.repacked_index import RepackedIndex

NOT_READ = "not read"
"""The part of tensors that the engine skips: vision towers, multi-token heads."""

# A tensor belongs to the first part whose mark its name holds (after the text model's prefix).
_MARKS = (
    ("embedding", "embed_tokens."),
    ("attention", ".self_attn."),
    ("gated delta", ".linear_attn."),
    ("experts", ".mlp.switch_mlp."),
    ("shared experts", ".mlp.shared_expert."),
    ("gates", ".mlp.gate."),
    ("gates", ".mlp.shared_expert_gate."),
    ("plain MLP", ".mlp."),
    ("norms", "norm."),
)


@dataclass(frozen=True)
class Part:
    """Tensors of one kind: how many bytes on disk, and how their matrices are packed.

    packings: (how, number of matrices), "4 bits, group size 64" or a dtype such as "BF16".
    """

    name: str
    tensors: int
    nbytes: int
    packings: tuple[tuple[str, int], ...]


def parts(
    checkpoint: Checkpoint, config: TargetConfig, repacked: RepackedIndex | None = None
) -> tuple[Part, ...]:
    """All tensors of the checkpoint by kind, in the order of the forward pass.

    repacked: the index of its experts where they lie in files of their own.
    """
    names: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        names.setdefault(_part(name, config), []).append(name)
    order = [*dict.fromkeys(part for part, _ in _MARKS), "head", NOT_READ]
    found = []
    for part in order:
        if part == "experts" and repacked is not None:
            found.append(_repacked(repacked))
        if part not in names:
            continue
        packings: Counter[str] = Counter()
        for name in names[part]:
            info = checkpoint.tensors[name]
            if not name.endswith(".weight") or len(info.shape) < 2:
                continue
            packing = None
            if part != NOT_READ:
                path = name.removesuffix(".weight")
                # A short convolution's kernel is a matrix to no one but its file.
                if not path.endswith("conv1d"):
                    packing = checkpoint.quantization(path, _inputs(path, config))
            packings[str(packing) if packing else info.dtype] += 1
        nbytes = sum(checkpoint.tensors[name].nbytes for name in names[part])
        found.append(Part(part, len(names[part]), nbytes, tuple(packings.most_common())))
    return tuple(found)


def architecture(config: TargetConfig) -> tuple[tuple[str, str], ...]:
    """(subject, words) rows."""
    kinds = Counter(config.layer_types)
    layers = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kinds.items())
    rope = config.rope
    scaling = "" if rope.rope_type == "default" else f", {rope.rope_type} factor {rope.factor:g}"
    rows = [
        ("family", config.family),
        ("layers", f"{config.num_layers}: {layers}"),
        ("width", f"hidden {config.hidden_size}, vocabulary {config.vocab_size}"),
        (
            "attention",
            f"{config.num_heads} heads, {config.num_kv_heads} key-value heads of {config.head_dim}"
            + (", output gate" if config.attn_output_gate else ""),
        ),
        (
            "rotary",
            f"{rope.dim} of {config.head_dim} dimensions, theta {rope.theta:g}{scaling}",
        ),
    ]
    if config.gdn is not None:
        gdn = config.gdn
        rows.append(
            (
                "gated delta",
                f"{gdn.num_key_heads} key heads of {gdn.key_dim}, {gdn.num_value_heads} value "
                f"heads of {gdn.value_dim}, convolution over {gdn.conv_kernel}",
            )
        )
    experts = (
        f"{config.num_experts} in each of {len(config.moe_layers)} layers, "
        f"{config.top_k} per token, width {config.moe_intermediate_size}"
    )
    if config.shared_intermediate_size:
        experts += f", shared expert of width {config.shared_intermediate_size}"
    rows += [
        ("experts", experts),
        ("context", f"{config.max_position} tokens"),
        ("head", "tied to the embedding" if config.tie_word_embeddings else "of its own"),
    ]
    return tuple(rows)


def parameters(
    checkpoint: Checkpoint, config: TargetConfig, repacked: RepackedIndex | None = None
) -> int:
    """Number of weights that the engine reads, packed ones counted one by one."""
    count = 0
    if repacked is not None:
        experts = sum(len(layer.places) for layer in repacked.layers)
        count = 3 * experts * config.hidden_size * config.moe_intermediate_size
    for name, info in checkpoint.tensors.items():
        if _part(name, config) == NOT_READ or name.endswith((".scales", ".biases")):
            continue
        elements = math.prod(info.shape)
        path = name.removesuffix(".weight")
        if f"{path}.scales" in checkpoint.tensors:
            elements = elements // info.shape[-1] * _inputs(path, config)
        count += elements
    return count


def _repacked(index: RepackedIndex) -> Part:
    """The experts of a repacked folder, padding included; tensors are counted as if stacked."""
    packings: Counter[str] = Counter()
    for layer in index.layers:
        for packing, weight in zip(
            layer.quantizations, (s for s in layer.slices if s.tensor == "weight"), strict=True
        ):
            packings[str(packing) if packing else weight.dtype] += 1
    return Part(
        "experts",
        sum(len(layer.slices) for layer in index.layers),
        sum(layer.nbytes for layer in index.layers),
        tuple(packings.most_common()),
    )


def _part(name: str, config: TargetConfig) -> str:
    if name.startswith(f"{config.head_prefix}lm_head."):
        return "head"
    if not name.startswith(config.prefix):
        return NOT_READ
    # A dot in front lets one mark serve layers and the tensors beside them alike.
    rest = "." + name.removeprefix(config.prefix)
    return next((part for part, mark in _MARKS if mark in rest), NOT_READ)


def _inputs(path: str, config: TargetConfig) -> int:
    """Inputs of the matrix at `path`."""
    if path.endswith(".o_proj"):
        return config.num_heads * config.head_dim
    if path.endswith(".out_proj"):
        assert config.gdn is not None
        return config.gdn.values
    if path.endswith(".switch_mlp.down_proj"):
        return config.moe_intermediate_size
    if path.endswith(".shared_expert.down_proj"):
        return config.shared_intermediate_size
    if path.endswith(".down_proj"):
        return config.intermediate_size
    return config.hidden_size
