"""Tensors: the tensors of one module of a checkpoint, by their names inside the module."""

import mlx.core as mx

from specdec.checkpoint import Checkpoint
from specdec.kernels.array import Array, Backend
from specdec.kernels.weight import Weight
from specdec.target.manifest import Manifest


class Tensors:
    """Reads what stands under a prefix to where a backend computes."""

    def __init__(
        self, checkpoint: Checkpoint, manifest: Manifest, prefix: str, backend: Backend
    ) -> None:
        self.checkpoint, self.manifest = checkpoint, manifest
        self.prefix, self.backend = prefix, backend

    def under(self, name: str) -> "Tensors":
        """The module `name` inside this one."""
        return Tensors(self.checkpoint, self.manifest, f"{self.prefix}{name}.", self.backend)

    def has(self, name: str) -> bool:
        return f"{self.prefix}{name}" in self.checkpoint.tensors

    def weight(self, name: str) -> Weight:
        """The matrix of module `name`, dense or quantized."""
        path = f"{self.prefix}{name}"
        return Weight.load(self.checkpoint, path, *self.manifest.matrices[path], self.backend)

    def array(self, name: str, dtype: mx.Dtype | None = None) -> Array:
        """The floating-point tensor `name`, cast to `dtype` or the backend's."""
        full = f"{self.prefix}{name}"
        return self.backend.load(self.checkpoint, full, self.manifest.arrays[full], dtype)
