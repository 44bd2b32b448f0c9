"""Tensors: the tensors of one module of a checkpoint, by their names inside the module."""

import mlx.core as mx

from specdec.checkpoint import Checkpoint
from specdec.kernels.array import Array, Backend
from specdec.kernels.weight import Weight


class Tensors:
    """Reads what stands under a prefix to where a backend computes, shapes checked."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, backend: Backend) -> None:
        self.checkpoint, self.prefix, self.backend = checkpoint, prefix, backend

    def under(self, name: str) -> "Tensors":
        """The module `name` inside this one."""
        return Tensors(self.checkpoint, f"{self.prefix}{name}.", self.backend)

    def has(self, name: str) -> bool:
        return f"{self.prefix}{name}" in self.checkpoint.tensors

    def weight(self, name: str, out: int, in_features: int) -> Weight:
        """The matrix [out, in_features] of module `name`, dense or quantized."""
        return Weight.load(self.checkpoint, f"{self.prefix}{name}", out, in_features, self.backend)

    def array(self, name: str, shape: tuple[int, ...], dtype: mx.Dtype | None = None) -> Array:
        """The floating-point tensor `name`, cast to `dtype` or the backend's."""
        self.checkpoint.floats(f"{self.prefix}{name}")
        return self.backend.load(self.checkpoint, f"{self.prefix}{name}", shape, dtype)
