"""Weight: a matrix (or a stack of matrices) as the linear operations take it, dense or quantized."""

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True, eq=False)
class Weight:
    """A dense or affine-quantized weight, rows are output features.

    data: floating [..., out, in], or uint32 [..., out, in * bits / 32] as MLX packs it
        (w = scale * q + bias per group of `group_size` input features, low bits first).
    scales, biases: floating [..., out, in / group_size], None when dense.
    bits, group_size: 0 when dense.
    """

    data: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bits: int = 0
    group_size: int = 0

    def __post_init__(self) -> None:
        assert (self.bits == 0) == (self.scales is None) == (self.biases is None)

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
        arrays = (self.data, self.scales, self.biases)
        return sum(array.nbytes for array in arrays if array is not None)
