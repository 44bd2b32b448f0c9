"""Taps: outputs of some layers for some rows, which a draft is told of."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array, concatenate, is_numpy
from specdec.kernels.executor import operation


@dataclass(frozen=True, eq=False)
class Taps:
    """The given rows of each part [n, width], or all of them where rows is None."""

    parts: Sequence[Array]
    rows: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.parts[0]) if self.rows is None else len(self.rows)

    @property
    def values(self) -> Array:
        """[rows, parts * width], side by side."""
        whole = concatenate(self.parts, axis=-1)
        if self.rows is None or list(self.rows) == list(range(len(whole))):
            return whole
        rows = np.asarray(self.rows)
        return whole[rows if is_numpy(whole) else mx.array(rows)]


@operation()
def tapped_rows(parts: Sequence[mx.array], rows: mx.array) -> mx.array:
    """[n, parts * width]: rows (int32 [n]) of each part [*, width], side by side."""
    return concatenate(parts, axis=-1)[rows]
