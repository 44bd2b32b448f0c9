"""Routing: which experts a row uses, and how much each counts."""

import mlx.core as mx

from specdec.kernels.array import Array, OnCpu, is_numpy

cpu = OnCpu("routing")


def route(logits: Array, top_k: int, normalize: bool) -> tuple[Array, Array]:
    """The top_k experts of each row and their weights.

    logits [rows, experts] -> experts int32 [rows, top_k] by falling logit (the lower expert first
    when equal), weights float32 [rows, top_k]: softmax over all experts, or, with `normalize`,
    over the chosen ones (which equals softmax, then renormalization). NaN counts as the largest
    logit, so that it ends up in the weights and is seen.
    """
    if is_numpy(logits):
        return cpu.route(logits, top_k, normalize)
    logits = logits.astype(mx.float32)
    # a stable sort of the negated logits puts the lower expert first among equals
    ranked = mx.where(mx.isnan(logits), -mx.inf, -logits)
    experts = mx.argsort(ranked, axis=-1)[:, :top_k]
    chosen = mx.take_along_axis(logits, experts, axis=-1)
    if normalize:
        return experts.astype(mx.int32), mx.softmax(chosen, axis=-1)
    return experts.astype(mx.int32), mx.exp(chosen - mx.logsumexp(logits, axis=-1, keepdims=True))
