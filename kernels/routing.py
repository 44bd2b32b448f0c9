"""Routing: which experts a row uses, and how much each counts."""

from dataclasses import dataclass

import mlx.core as mx

from specdec.kernels.array import Array
from specdec.kernels.executor import operation
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm


@dataclass(frozen=True, eq=False)
class Routing:
    """The chosen experts of each row.

    experts: int32 [rows, top_k], by falling logit (the lower expert first when equal).
    weights: float32 [rows, top_k].
    union: of the GPU kernels alone, int32 [n, 2]: each expert that is used and a bit mask of the
        rows that use it, ascending by expert, then pairs (-1, 0).
    normed: of the GPU kernels on matrix units alone, what experts read of x: kernels/gpu/normed.py.
    """

    experts: Array
    weights: Array
    union: Array = None
    normed: Array = None


@operation("few rows")
def route(
    logits: Piece,
    top_k: int,
    normalize: bool,
    x: Array = None,
    norm: Norm | None = None,
) -> Routing:
    """The top_k experts of each row and their weights.

    logits: [rows, experts]. The weights are softmax over all experts, or, with `normalize`, over
    the chosen ones (which equals softmax, then renormalization). NaN counts as the largest logit,
    so that it ends up in the weights and is seen.
    x [rows, hidden] and its norm: what the experts will be asked for, if they will be.
    """
    values = logits.values.astype(mx.float32)
    # a stable sort of the negated logits puts the lower expert first among equals
    ranked = mx.where(mx.isnan(values), -mx.inf, -values)
    experts = mx.argsort(ranked, axis=-1)[:, :top_k]
    chosen = mx.take_along_axis(values, experts, axis=-1)
    if normalize:
        weights = mx.softmax(chosen, axis=-1)
    else:
        weights = mx.exp(chosen - mx.logsumexp(values, axis=-1, keepdims=True))
    return Routing(experts.astype(mx.int32), weights)
