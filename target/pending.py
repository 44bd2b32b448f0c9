"""Pending: a verify pass that was begun and is not committed."""

from dataclasses import dataclass

import numpy as np

from specdec.kernels.array import Array, to_numpy
from specdec.target.passes import TreePass


@dataclass(frozen=True, eq=False)
class Output:
    """logits [rows, vocab] and taps [rows, taps * hidden] (the tapped layers' outputs in order).

    Of a prefill, logits has the last row alone unless all were asked for.
    """

    logits: Array
    taps: Array


@dataclass(frozen=True, eq=False)
class Pending:
    """tokens int32 [rows], maybe known to the device alone; finite bool [rows], of the logits."""

    tokens: Array
    this: TreePass
    output: Output
    finite: Array

    def host_tokens(self) -> np.ndarray:
        return to_numpy(self.tokens)
