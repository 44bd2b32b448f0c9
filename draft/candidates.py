"""The most probable tokens of every slot, out of logits over a large vocabulary.

A sort or a partition of 248,000 logits per slot would cost more than the draft itself. So: the
maxima of runs of neighbouring ids are taken on the device, and since each of the `width` best
tokens lies in one of the `width` best runs, only those runs are looked at on the host. The kernels
of a GPU find them all there, for one small array to be read back. Exact, and
deterministic: equal logits are taken in the order of their ids.
"""

import mlx.core as mx
import numpy as np

from specdec.errors import NonFiniteError
from specdec.kernels.array import Array, OnCpu, evaluate, is_numpy, to_numpy
from specdec.kernels.executor import uses_gpu_kernels
from specdec.kernels.top_tokens import top_tokens
from specdec.tree.block import Block

cpu = OnCpu("candidates")

_RUN = 256  # ids per run


def top_candidates(logits: Array, width: int) -> Block:
    """The `width` best tokens of each row of logits [slots, vocab] with their log-probabilities.

    log-softmax at temperature 1, from float32 logits. Narrower where the vocabulary is smaller.
    NonFiniteError on NaN or +Inf.
    """
    slots, vocab = logits.shape
    width = min(width, vocab)
    runs = -(-vocab // _RUN)
    if is_numpy(logits):
        tokens, log_probs, log_totals = cpu.top_candidates(logits, width)
        _check(log_totals)
        return Block(tokens, np.minimum(log_probs - log_totals, 0.0))
    if uses_gpu_kernels():
        return as_block(to_numpy(top_tokens(logits, width)))
    logits = logits.astype(mx.float32)
    whole = vocab // _RUN * _RUN
    tops = [logits[:, :whole].reshape(slots, -1, _RUN).max(axis=-1)]
    if whole < vocab:
        tops.append(logits[:, whole:].max(axis=-1, keepdims=True))
    top, totals = mx.concatenate(tops, axis=-1), mx.logsumexp(logits, axis=-1, keepdims=True)
    evaluate(logits, top, totals)
    host = np.array(logits, copy=False)  # shares the memory
    maxima, log_totals = np.array(top), np.array(totals, dtype=np.float64)
    _check(log_totals)

    best_runs = np.argsort(-maxima, axis=1, kind="stable")[:, : min(width, runs)]
    tokens = np.empty((slots, width), np.int32)
    log_probs = np.empty((slots, width))
    for slot in range(slots):
        ids = (np.sort(best_runs[slot])[:, None] * _RUN + np.arange(_RUN)).reshape(-1)
        ids = ids[ids < vocab]
        values = host[slot, ids]
        least = np.partition(values, -width)[-width]
        ids, values = ids[values >= least], values[values >= least]
        best = np.argsort(-values, kind="stable")[:width]
        tokens[slot], log_probs[slot] = ids[best], values[best]
    # logsumexp may round to just below the largest logit
    return Block(tokens, np.minimum(log_probs - log_totals, 0.0))


def as_block(found: np.ndarray) -> Block:
    """What kernels.top_tokens found, int32 [slots, 2 * width + 3]; NonFiniteError as above."""
    width = (found.shape[1] - 3) // 2
    floats = found[:, width:-1].view(np.float32).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        log_totals = floats[:, -2:-1] + np.log(floats[:, -1:])
    _check(log_totals)
    return Block(found[:, :width], np.minimum(floats[:, :width] - log_totals, 0.0))


def _check(log_totals: np.ndarray) -> None:
    if not np.isfinite(log_totals).all():
        raise NonFiniteError("NaN or Inf in the draft's logits")
