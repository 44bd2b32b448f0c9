"""Weight: a matrix, or a stack of matrices, dense or quantized, as linear operations take it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import mlx.core as mx
import numpy as np

from specdec.checkpoint import Checkpoint
from specdec.kernels.array import Array, Backend, concatenate, is_numpy


@dataclass(frozen=True, eq=False)
class Weight:
    """A dense or affine-quantized weight, rows are output features.

    data: floating [..., out, in], or uint32 [..., out, in * bits / 32] as MLX packs it
        (w = scale * q + bias per group of `group_size` input features, low bits first).
    scales, biases: floating [..., out, in / group_size], None when dense.
    bits, group_size: 0 when dense.
    """

    data: Array
    scales: Array = None
    biases: Array = None
    bits: int = 0
    group_size: int = 0

    def __post_init__(self) -> None:
        assert (self.bits == 0) == (self.scales is None) == (self.biases is None)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        path: str,
        out: int,
        in_features: int,
        backend: Backend,
        as_stored: bool = False,
    ) -> Self:
        """Read the matrix [out, in_features] of a module to where the backend computes.

        path: the module's name, "model.embed_tokens" for "model.embed_tokens.weight".
        as_stored: on a CPU, keep a dense bfloat16 matrix in its 16 bits, as uint16; kernels/cpu
            reads it as it is, in half the time where memory is what takes time.
        CheckpointError when a tensor is missing or has another shape or packing.
        """
        quantization = checkpoint.quantization(path, in_features)
        if quantization is None:
            name, shape = f"{path}.weight", (out, in_features)
            if as_stored and backend.name == "cpu" and checkpoint.info(name).dtype == "BF16":
                bits = checkpoint.load(name, shape, mx.bfloat16).view(mx.uint16)
                return cls(backend.place(bits))
            return cls(backend.load(checkpoint, name, shape))
        packed = in_features * quantization.bits // 32
        groups = in_features // quantization.group_size
        return cls(
            backend.load(checkpoint, f"{path}.weight", (out, packed)),
            backend.load(checkpoint, f"{path}.scales", (out, groups)),
            backend.load(checkpoint, f"{path}.biases", (out, groups)),
            quantization.bits,
            quantization.group_size,
        )

    def part(self, start: int, stop: int) -> Self:
        """Output features start to stop - 1, in the same memory."""
        data, scales, biases = (None if a is None else a[start:stop] for a in self.arrays)
        return type(self)(data, scales, biases, self.bits, self.group_size)

    def rows(self, index: np.ndarray) -> "Weight":
        """The output features of a matrix in another order; exact, for packing is along a row."""
        return self._each(lambda array: array[index if is_numpy(array) else mx.array(index)])

    def on(self, backend: Backend) -> "Weight":
        """The same weight as a backend holds it."""
        return self._each(backend.place)

    @cached_property
    def table(self) -> np.ndarray:
        """int64 [8], what kernels/cpu reads of a weight: the addresses of its data, scales and
        biases; bits (32 for float32), group size, input and output features; bytes of a row.

        Its arrays lie row by row, a stack matrix by matrix, and live as long as the weight.
        """
        assert all(a.flags.c_contiguous for a in self.arrays if a is not None)
        places = [0 if a is None else a.ctypes.data for a in self.arrays]
        bits = self.bits or 8 * self.data.itemsize
        sizes = self.group_size, self.in_features, self.out_features, self.data.strides[-2]
        return np.array([*places, bits, *sizes], np.int64)

    def same_format(self, other: "Weight") -> bool:
        """Whether the two could be one matrix: equal bits, group size, inputs and dtype."""
        return (self.bits, self.group_size, self.data.shape[-1], self.data.dtype) == (
            other.bits,
            other.group_size,
            other.data.shape[-1],
            other.data.dtype,
        )

    def stacked_on(self, other: "Weight") -> "Weight":
        """One matrix with the other's output features first; they must have the same format."""
        assert self.same_format(other)
        pairs = [
            None if mine is None or theirs is None else concatenate([theirs, mine], axis=-2)
            for mine, theirs in zip(self.arrays, other.arrays, strict=True)
        ]
        assert pairs[0] is not None
        return Weight(pairs[0], pairs[1], pairs[2], self.bits, self.group_size)

    def _each(self, change: Callable[[Array], Array]) -> "Weight":
        data, scales, biases = (None if a is None else change(a) for a in self.arrays)
        assert data is not None
        return Weight(data, scales, biases, self.bits, self.group_size)

    @property
    def arrays(self) -> tuple[Array, Array, Array]:
        return self.data, self.scales, self.biases

    @property
    def quantized(self) -> bool:
        return self.bits != 0

    @property
    def out_features(self) -> int:
        return self.data.shape[-2]

    @property
    def in_features(self) -> int:
        columns = self.data.shape[-1]
        return columns * 32 // self.bits if self.quantized else columns

    @property
    def nbytes(self) -> int:
        """Resident bytes."""
        return sum(array.nbytes for array in self.arrays if array is not None)
