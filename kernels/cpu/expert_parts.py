"""The compiled feed-forward: experts and their features as parts that threads take.

A small expert is one part, from its rows' inputs to its outputs. A large one is split twice: into
features of what stands between its matrices, and into features of its outputs.
"""

import numpy as np

from specdec.kernels.cpu.decode import aligned
from specdec.kernels.cpu.dots import STEP
from specdec.kernels.cpu.exp import sigmoid, silu
from specdec.kernels.cpu.jit import jit
from specdec.kernels.cpu.norm import normalize
from specdec.kernels.cpu.products import (
    BITS,
    OUT,
    PART,
    SIZE,
    lay_out,
    lay_out_part,
    multiply,
    padded_size,
    part_width,
)
from specdec.kernels.cpu.team import share, take
from specdec.kernels.cpu.vectors import weigh

# What is done of the shared expert: what stands between its matrices, and what comes after.
INNER, OUTER = 1, 2
GATE, DOWN = 0, 2  # of the three matrices of an expert; 1 is up
WHOLE = 8 * PART  # experts worth less are not split
SUMMED = 4  # rows that are summed up in one part


@jit
def compute_experts(  # type: ignore[no-untyped-def]
    team,
    code,
    x,
    scale,
    eps,
    gate,
    up,
    down,
    experts,
    table,
    apart,
    weights,
    shared_gate,
    shared_up,
    shared_down,
    gate_of_shared,
    column,
    work,
    hidden,
    out,
):
    """Fill `apart` for the experts given, and `hidden` if `work` says so; then sum up to `out`
    where that has rows."""
    rows, size = x.shape
    # Pairs of a row and an expert, by expert; the shared expert and all rows come last.
    order, used, ends = _by_slot(experts, table)
    routed, groups = len(order), len(used) - 1
    rows_of = np.arange(routed + rows) - routed
    for i in range(routed):
        rows_of[i] = order[i] // experts.shape[1]
    ends[groups + 1] = len(rows_of)
    tables = np.empty((6, len(gate)), np.int64)
    tables[0], tables[1], tables[2] = gate, up, down
    tables[3], tables[4], tables[5] = shared_gate, shared_up, shared_down
    first = 0 if routed else groups  # of the experts that have something to do
    last = groups + 1 if work & INNER else groups
    parts, starts = _split(tables, GATE, ends, first, last, groups)
    # Large experts alone are split: the others are done with in one part.
    split = work == OUTER
    for group in range(first, last):
        split = split or starts[1, group] < tables[GATE + (3 if group == groups else 0), OUT]
    inner_size = max(padded_size(down), padded_size(shared_down))
    inner = aligned(len(rows_of) if split else 0, inner_size)
    if work == OUTER:
        for row in range(rows):
            lay_out(shared_down, hidden[row], inner[routed + row])
    outer = np.empty((rows if work & OUTER else 0, size), np.float32)
    experts_of = tables, used, ends
    pairs = order, rows_of
    results = hidden, inner, apart, outer
    share(team, parts, _begin, (code, x, scale, eps, *experts_of, starts, *pairs, work, *results))
    if split:
        last = groups + 1 if work & OUTER else groups
        parts, starts = _split(tables, DOWN, ends, first, last, groups, starts)
        share(team, parts, _end, (code, *experts_of, starts, *pairs, inner, apart, outer))
    if len(out) > 0:
        sums = x, apart, weights, outer, gate_of_shared, column, out
        share(team, (rows + SUMMED - 1) // SUMMED, _sum_up, sums)


@jit
def _split(tables, matrix, ends, first, last, shared, before=None):  # type: ignore[no-untyped-def]
    """How the experts `first` to `last` - 1 are split: how many parts, and where each one's parts
    begin and how many features they have. before: what they were split into; those that were not
    are done with. The shared expert, which has most rows, comes first; how many parts it has stands
    in the last place."""
    starts = np.zeros((2, len(ends)), np.int64)
    parts = 0
    for routed in range(2):
        for group in range(first if routed else shared, min(last, shared) if routed else last):
            three = 0 if routed else 3
            w, both = tables[three + matrix], 2 if matrix == GATE else 1
            rows = ends[group + 1] - ends[group]
            width = part_width(w[OUT], both * w[SIZE], rows, STEP)
            if both * w[SIZE] * w[OUT] * (4 + rows) <= WHOLE:
                width = w[OUT]
            starts[0, group], starts[1, group] = parts, width
            if before is None or before[1, group] < tables[three + GATE, OUT]:
                parts += (w[OUT] + width - 1) // width
        if not routed:
            starts[1, shared + 1] = parts
    return parts, starts


@jit
def _group(starts, part):  # type: ignore[no-untyped-def]
    """The expert that a part is of."""
    shared = starts.shape[1] - 2
    if part < starts[1, shared + 1]:
        return shared
    group = 0
    while group + 1 < shared and starts[0, group + 1] <= part:
        group += 1
    return group


@jit
def _begin(  # type: ignore[no-untyped-def]
    left,
    part,
    code,
    x,
    scale,
    eps,
    tables,
    used,
    ends,
    starts,
    order,
    rows_of,
    work,
    hidden,
    inner,
    apart,
    outer,
):
    """What stands between an expert's matrices, and its outputs where a part is a whole expert."""
    rows, size = x.shape
    shared, most = len(used) - 1, 0
    for group in range(len(used)):
        most = max(most, ends[group + 1] - ends[group])
    h = np.empty((rows, size), np.float32)
    packed, plain = _inputs(tables, rows, True), _inputs(tables, rows, False)
    g = np.empty((most, max(tables[0, OUT], tables[3, OUT])), np.float32)
    u = np.empty(g.shape, np.float32)
    inner_size = max(padded_size(tables[2]), padded_size(tables[5]))
    own, y = aligned(most, inner_size), np.empty((most, size), np.float32)
    straight = np.arange(most)
    for row in range(rows):
        normalize(x[row], scale, eps, h[row])
        for at in range(6):
            if at % 3 != DOWN and tables[at, OUT] > 0:
                lay_out(tables[at], h[row], (packed if tables[at, BITS] == 4 else plain)[row])
    done = 0
    while part >= 0:
        group = _group(starts, part)
        three = 3 if group == shared else 0
        first, last, features = ends[group], ends[group + 1], tables[three + GATE, OUT]
        start = (part - starts[0, group]) * starts[1, group]
        stop = min(start + starts[1, group], features)
        whole = stop - start == features
        for matrix in range(2):
            w = tables[three + matrix]
            inputs, to = packed if w[BITS] == 4 else plain, g if matrix == GATE else u
            multiply(code, w, used[group], inputs, rows_of[first:last], to, start, stop)
        w = tables[three + DOWN]
        for i in range(last - first):
            gated, other = g[i, start:stop], u[i, start:stop]
            for j in range(len(gated)):
                gated[j] = silu(gated[j]) * other[j]
            if group == shared and work == INNER:
                hidden[i, start:stop] = g[i, start:stop]
            else:
                lay_out_part(w, g[i], own[i] if whole else inner[first + i], start, stop)
        if whole and not (group == shared and work == INNER):
            multiply(code, w, used[group], own, straight[: last - first], y, 0, size)
            for i in range(last - first):
                to = outer[i] if group == shared else apart[order[first + i]]
                for j in range(size):
                    to[j] = y[i, j]
        part = take(left)
        done += 1
    return done


@jit
def _inputs(tables, rows, packed):  # type: ignore[no-untyped-def]
    """Room for inputs of the gates and ups that are 4-bit matrices, or of those that are not."""
    size = 0
    for at in range(len(tables)):
        if at % 3 != DOWN and tables[at, OUT] > 0 and (tables[at, BITS] == 4) == packed:
            size = padded_size(tables[at])
    return aligned(rows, size)


@jit
def _end(  # type: ignore[no-untyped-def]
    left, part, code, tables, used, ends, starts, order, rows_of, inner, apart, outer
):
    """Features of the outputs of experts that were split."""
    shared, most = len(used) - 1, 0
    for group in range(len(used)):
        most = max(most, ends[group + 1] - ends[group])
    y = np.empty((most, max(tables[2, OUT], tables[5, OUT])), np.float32)
    straight = np.arange(ends[-1])
    done = 0
    while part >= 0:
        group = _group(starts, part)
        w = tables[DOWN + (3 if group == shared else 0)]
        first, last = ends[group], ends[group + 1]
        start = (part - starts[0, group]) * starts[1, group]
        stop = min(start + starts[1, group], w[OUT])
        multiply(code, w, used[group], inner, straight[first:last], y, start, stop)
        for i in range(last - first):
            to = outer[i] if group == shared else apart[order[first + i]]
            for j in range(start, stop):
                to[j] = y[i, j]
        part = take(left)
        done += 1
    return done


@jit
def _sum_up(left, part, x, apart, weights, outer, gate_of_shared, column, out):  # type: ignore[no-untyped-def]
    """Rows of x plus their experts' weighted outputs, SUMMED rows a part."""
    rows, size = x.shape
    top_k = weights.shape[1]
    total, factor = np.empty(size, np.float32), np.empty(1, np.float32)
    done = 0
    while part >= 0:
        for row in range(part * SUMMED, min(part * SUMMED + SUMMED, rows)):
            total[:] = 0
            weigh(apart, row * top_k, weights[row], 0, top_k, total)
            if len(outer) > 0:
                factor[0] = sigmoid(gate_of_shared[row, column])
                weigh(outer, row, factor, 0, 1, total)
            for i in range(size):
                out[row, i] = x[row, i] + total[i]
        part = take(left)
        done += 1
    return done


@jit
def _by_slot(experts, table):  # type: ignore[no-untyped-def]
    """Pairs by slot, those without one left out: their order, the slots in use, and where each
    one's pairs begin and end; in the latter two there is room for one expert more."""
    rows, top_k = experts.shape
    stack = 0
    for slot in table:
        stack = max(stack, slot + 1)
    starts = np.zeros(stack + 1, np.int64)
    for row in range(rows):
        for k in range(top_k):
            slot = table[experts[row, k]]
            if slot >= 0:
                starts[slot + 1] += 1
    groups = 0
    for slot in range(stack):
        groups += starts[slot + 1] > 0
    used = np.zeros(groups + 1, np.int64)
    ends = np.zeros(groups + 2, np.int64)
    groups = 0
    for slot in range(stack):
        if starts[slot + 1] > 0:
            used[groups] = slot
            groups += 1
            ends[groups] = ends[groups - 1] + starts[slot + 1]
        starts[slot + 1] += starts[slot]
    order = np.empty(starts[stack], np.int64)
    for row in range(rows):
        for k in range(top_k):
            slot = table[experts[row, k]]
            if slot >= 0:
                order[starts[slot]] = row * top_k + k
                starts[slot] += 1
    return order, used, ends
