"""Pending: a verify pass that was begun and is not committed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from specdec.kernels.array import Array, to_numpy
from specdec.kernels.tapped import Taps
from specdec.target.grown_tree import GrownTree
from specdec.target.passes import TreePass


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a GPU found of the logits of each row (kernels.top_tokens), read back together, once.

    rows: int32 [rows, 2].
    """

    rows: mx.array

    @cached_property
    def _host(self) -> np.ndarray:
        return to_numpy(self.rows)

    def known(self, rows: np.ndarray) -> None:
        """What was read back with other things, so as not to be read again."""
        self.__dict__["_host"] = rows.reshape(-1, 2)

    @property
    def best(self) -> np.ndarray:
        """int32 [rows]: the most probable token, the lowest id among equals."""
        return self._host[:, 0]

    @property
    def finite(self) -> np.ndarray:
        """bool [rows]"""
        return self._host[:, 1] != 0

    @property
    def lone_token(self) -> mx.array:
        """int32 [1]: the most probable token after a lone root, on the device."""
        return self.rows[0, :1]


@dataclass(frozen=True, eq=False)
class Output:
    """logits [rows, vocab], and each tapped layer's output [rows, hidden], in order.

    Of a prefill, logits has the last row alone unless all were asked for. verdict: of a verify
    pass on a GPU.
    """

    logits: Array
    tapped: Sequence[Array]
    verdict: Verdict | None = None

    @property
    def taps(self) -> Array:
        """The tapped outputs side by side: [rows, taps * hidden]."""
        return Taps(self.tapped).values


@dataclass(frozen=True, eq=False)
class Pending:
    """tokens int32 [rows], maybe known to the device alone; finite bool [rows], of the logits,
    where there is no verdict."""

    tokens: Array
    this: TreePass
    output: Output
    finite: Array | None

    @property
    def grown(self) -> GrownTree | None:
        """The tree, where a GPU grew it."""
        return self.this.grown

    def host_tokens(self) -> np.ndarray:
        return to_numpy(self.tokens) if self.grown is None else self.grown.host.tokens

    def host_finite(self) -> np.ndarray:
        verdict = self.output.verdict
        return to_numpy(self.finite) if verdict is None else verdict.finite
