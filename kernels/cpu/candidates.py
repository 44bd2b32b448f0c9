"""The most probable tokens of rows of logits."""

import math

import numpy as np

from specdec.kernels.cpu.exp import exp
from specdec.kernels.cpu.jit import jit
from specdec.kernels.cpu.team import TEAM, share, take

_RUN = 256  # ids that are passed over together when none can be among the best


def top_candidates(logits: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The `width` largest of each row of logits [rows, vocab], the lower id first when equal.

    Returns their ids int32 and values float64 [rows, width], and log(sum(exp(row))) float64
    [rows, 1]: NaN where the row holds NaN or +Inf.
    """
    rows = len(logits)
    ids, values = np.zeros((rows, width), np.int32), np.empty((rows, width))
    totals = np.empty((rows, 1))
    _top(TEAM.place, np.ascontiguousarray(logits), ids, values, totals)
    return ids, values, totals


@jit
def _top(team, logits, ids, values, totals):  # type: ignore[no-untyped-def]
    share(team, logits.shape[0], _top_rows, (logits, ids, values, totals))


@jit
def _top_rows(left, row, logits, ids, values, totals):  # type: ignore[no-untyped-def]
    vocab = logits.shape[1]
    width = ids.shape[1]
    runs = (vocab + _RUN - 1) // _RUN
    maxima = np.empty(runs, np.float32)
    done = 0
    while row >= 0:
        for run in range(runs):
            part = logits[row, run * _RUN : min(run * _RUN + _RUN, vocab)]
            highest = part[0]
            for i in range(len(part)):
                highest = max(highest, part[i])
            maxima[run] = highest
        peak = maxima[0]
        for run in range(runs):
            peak = max(peak, maxima[run])
        total = np.float64(0)
        for run in range(runs):
            part = logits[row, run * _RUN : min(run * _RUN + _RUN, vocab)]
            partial = np.float32(0)
            for i in range(len(part)):
                partial += exp(part[i] - peak)
            total += partial
        totals[row, 0] = math.log(total) + peak
        count = 0
        for run in range(runs):
            if count == width and maxima[run] <= values[row, width - 1]:
                continue
            first = run * _RUN
            for i in range(first, min(first + _RUN, vocab)):
                value = logits[row, i]
                if count == width and value <= values[row, width - 1]:
                    continue
                at = min(count, width - 1)
                while at > 0 and values[row, at - 1] < value:
                    values[row, at], ids[row, at] = values[row, at - 1], ids[row, at - 1]
                    at -= 1
                values[row, at], ids[row, at] = value, i
                count = min(count + 1, width)
        row = take(left)
        done += 1
    return done
