"""Store: where routed experts lie on disk, whichever way their files are laid out.

A store answers where; it reads no data itself (target/expert_reader.py does). Two exist: experts
stacked in the safetensors files of an unmodified checkpoint (target/expert_store.py), and one file
per layer with all slices of an expert beside each other (a repacked folder).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import mlx.core as mx

from specdec.checkpoint import Checkpoint
from specdec.quantization import Quantization
from specdec.shards import FLOATS, ITEM_BYTES
from specdec.target.config import TargetConfig

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ExpertTensor:
    """One expert's slice of one tensor: `shape` without the expert axis, dtype as on disk."""

    projection: str
    tensor: str  # weight, scales or biases
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes_on_disk(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def bytes_resident(self, dtype: mx.Dtype) -> int:
        """Bytes in a bank: packed weights as they are, floats in `dtype`."""
        size = dtype.size if self.dtype in FLOATS else ITEM_BYTES[self.dtype]
        return math.prod(self.shape) * size


@dataclass(frozen=True)
class Geometry:
    """What an expert of a layer is made of; layers of equal geometry can share slots.

    tensors: gate, up, down in this order, each as weight or as weight, scales, biases.
    quantizations: of gate, up, down; None where dense.
    """

    tensors: tuple[ExpertTensor, ...]
    quantizations: tuple[Quantization | None, ...]

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of one expert's slices, what lies between them left out."""
        return sum(tensor.bytes_on_disk for tensor in self.tensors)

    def bytes_resident(self, dtype: mx.Dtype) -> int:
        """Bytes of one expert in memory, floats in `dtype`."""
        return sum(tensor.bytes_resident(dtype) for tensor in self.tensors)


@dataclass(frozen=True)
class StoreFile:
    """A file that holds experts. descriptor: open for reading for as long as the store is."""

    path: Path
    descriptor: int


class Span(NamedTuple):
    """One tensor slice of one expert: `nbytes` bytes from the absolute `offset` of files[file]."""

    file: int
    offset: int
    nbytes: int


class Store(Protocol):
    """The experts of all MoE layers, on disk. Headers are checked when a store is made.

    checkpoint: everything of the model that is not a routed expert, and config.json.
    layers: the layers with experts, ascending; each has `num_experts` of them.
    files: those that spans point into.
    """

    checkpoint: Checkpoint
    config: TargetConfig
    num_experts: int
    layers: tuple[int, ...]

    @property
    def files(self) -> tuple[StoreFile, ...]: ...

    def geometry(self, layer: int) -> Geometry: ...

    def spans(self, layer: int, expert: int) -> tuple[Span, ...]:
        """Where an expert's slices lie, in the order of the geometry's `tensors`."""
        ...
