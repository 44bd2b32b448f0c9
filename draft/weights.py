"""DraftWeights: the tensors of a DFlash draft, checked whole before the first is read.

Names may carry the prefix "model." or not, matrices may be dense or packed as MLX packs them.
Embedding and output head belong to the target: copies in the draft's files (embed_tokens, lm_head)
are not read. Any other tensor that is not part of a DFlash draft is refused by name.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import mlx.core as mx

from specdec.checkpoint import Checkpoint
from specdec.draft.config import DraftConfig
from specdec.errors import CheckpointError
from specdec.kernels.array import Array, Backend
from specdec.kernels.linear import Projections
from specdec.kernels.weight import Weight

_BORROWED = ("embed_tokens.", "lm_head.")


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer; norms are [hidden], q_norm and k_norm [head_dim]."""

    input_norm: Array
    qkv: Projections  # queries [heads * head_dim, hidden], keys, values [kv_heads * head_dim, ..]
    o: Weight  # [hidden, heads * head_dim]
    q_norm: Array
    k_norm: Array
    post_norm: Array
    gate_up: Projections  # both [intermediate, hidden]
    down: Weight  # [hidden, intermediate]

    @classmethod
    def of(cls, q: Weight, k: Weight, v: Weight, gate: Weight, up: Weight, **others: Any) -> Self:
        """From a layer's tensors, each by itself."""
        return cls(qkv=Projections([q, k, v]), gate_up=Projections([gate, up]), **others)

    @cached_property
    def told(self) -> Projections:
        """Keys and values, of which told rows have no queries."""
        return self.qkv.after(1)


@dataclass(frozen=True, eq=False)
class DraftWeights:
    """fc fuses the tapped rows [hidden, taps * hidden]; hidden_norm follows it; norm ends."""

    fc: Weight
    hidden_norm: Array
    norm: Array
    layers: tuple[LayerWeights, ...]

    @classmethod
    def load(cls, checkpoint: Checkpoint, config: DraftConfig, backend: Backend) -> Self:
        """Read all weights to where the backend computes.

        CheckpointError on a missing, surplus or misshapen tensor, before anything is read.
        """
        files = _Files(checkpoint, config)
        files.check()
        layers = tuple(
            LayerWeights.of(**files.read(_layer(config), backend, f"layers.{i}."))
            for i in range(config.num_layers)
        )
        return cls(**files.read(_top(config), backend), layers=layers)


def weight_bytes(
    checkpoint: Checkpoint, config: DraftConfig, dtype: mx.Dtype, as_stored: bool = False
) -> int:
    """Resident bytes of the draft's weights; checks all of them and reads none.

    as_stored: whether dense bfloat16 matrices stay what they are (see Weight.load).
    """
    return _Files(checkpoint, config).check(dtype.size, as_stored)


# field -> (name in the file, shape): a vector is a norm, a matrix a linear layer
_Table = dict[str, tuple[str, tuple[int, ...]]]


def _top(config: DraftConfig) -> _Table:
    hidden = config.hidden_size
    return {
        "fc": ("fc", (hidden, len(config.target_layer_ids) * hidden)),
        "hidden_norm": ("hidden_norm", (hidden,)),
        "norm": ("norm", (hidden,)),
    }


def _layer(config: DraftConfig) -> _Table:
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim
    return {
        "input_norm": ("input_layernorm", (hidden,)),
        "q": ("self_attn.q_proj", (queries, hidden)),
        "k": ("self_attn.k_proj", (keys, hidden)),
        "v": ("self_attn.v_proj", (keys, hidden)),
        "o": ("self_attn.o_proj", (hidden, queries)),
        "q_norm": ("self_attn.q_norm", (dim,)),
        "k_norm": ("self_attn.k_norm", (dim,)),
        "post_norm": ("post_attention_layernorm", (hidden,)),
        "gate": ("mlp.gate_proj", (inner, hidden)),
        "up": ("mlp.up_proj", (inner, hidden)),
        "down": ("mlp.down_proj", (hidden, inner)),
    }


class _Files:
    """The draft's tensors in a checkpoint, by module path."""

    def __init__(self, checkpoint: Checkpoint, config: DraftConfig) -> None:
        self.checkpoint, self.config = checkpoint, config

    def check(self, itemsize: int = 4, as_stored: bool = False) -> int:
        """Names, shapes, dtypes and packing of everything; the resident bytes."""
        tables = [("", _top(self.config))]
        tables += [(f"layers.{i}.", _layer(self.config)) for i in range(self.config.num_layers)]
        known: set[str] = set()
        total = 0
        for prefix, table in tables:
            for name, shape in table.values():
                path = self._path(prefix + name)
                for part in ("weight", "scales", "biases"):
                    info = self.checkpoint.tensors.get(f"{path}.{part}")
                    if info is not None:
                        known.add(info.name)
                        kept = as_stored and info.dtype == "BF16" and part == "weight"
                        if info.dtype == "U32" or (kept and len(shape) == 2):
                            total += info.nbytes
                        else:
                            total += math.prod(info.shape) * itemsize
                self._check_module(path, shape)
        surplus = [
            name
            for name in self.checkpoint.tensors
            if name not in known and not name.removeprefix("model.").startswith(_BORROWED)
        ]
        if surplus:
            shown = ", ".join(sorted(surplus)[:4]) + (", ..." if len(surplus) > 4 else "")
            raise CheckpointError(
                f"{self.checkpoint.folder}: {len(surplus)} tensors are no part of a DFlash draft "
                f"of {self.config.num_layers} layers: {shown}"
            )
        return total

    def read(self, table: _Table, backend: Backend, prefix: str = "") -> dict[str, Any]:
        """The tensors of a table by field: norms as arrays, linear layers as weights."""
        found: dict[str, Any] = {}
        for field, (name, shape) in table.items():
            path = self._path(prefix + name)
            if len(shape) == 1:
                found[field] = backend.load(self.checkpoint, f"{path}.weight", shape)
            else:
                out, columns = shape
                found[field] = Weight.load(
                    self.checkpoint, path, out, columns, backend, as_stored=True
                )
        return found

    def _path(self, name: str) -> str:
        with_prefix = f"model.{name}"
        return with_prefix if f"{with_prefix}.weight" in self.checkpoint.tensors else name

    def _check_module(self, path: str, shape: tuple[int, ...]) -> None:
        packing = None if len(shape) == 1 else self.checkpoint.quantization(path, shape[-1])
        if packing is None:
            self.checkpoint.floats(f"{path}.weight", shape)
            return
        info = self.checkpoint.info(f"{path}.weight")
        if info.shape[0] != shape[0]:
            raise CheckpointError(
                f"{info.file}: tensor {info.name} has {info.shape[0]} rows, expected {shape[0]}"
            )
