"""The most probable tokens of each row, as small arrays that are read back at once."""

import mlx.core as mx

from specdec.kernels.executor import operation


@operation("few rows")
def top_tokens(logits: mx.array, width: int) -> mx.array:
    """int32 [rows, 2 * width + 3] of logits [rows, vocab], vocab >= width: the `width` best ids by
    falling logit, among equals by rising id; the bits of their logits as float32; the bits of the
    largest logit and of the sum of exp(logit - largest); whether all logits are finite."""
    logits = logits.astype(mx.float32)
    ids = mx.argsort(-logits, axis=-1)[:, :width]
    best = mx.take_along_axis(logits, ids, axis=-1)
    sums = mx.exp(logits - best[:, :1]).sum(axis=-1, keepdims=True)
    bits = [part.view(mx.int32) for part in (mx.contiguous(best), mx.contiguous(best[:, :1]), sums)]
    return mx.concatenate([ids.astype(mx.int32), *bits, _finite(logits)], axis=-1)


@operation("few rows")
def verdict(logits: mx.array) -> mx.array:
    """int32 [rows, 2] of logits [rows, vocab]: the most probable id, the lowest among equals, and
    whether all logits are finite."""
    best = mx.argmax(logits, axis=-1, keepdims=True).astype(mx.int32)
    return mx.concatenate([best, _finite(logits)], axis=-1)


def _finite(logits: mx.array) -> mx.array:
    return mx.isfinite(logits).all(axis=-1, keepdims=True).astype(mx.int32)
