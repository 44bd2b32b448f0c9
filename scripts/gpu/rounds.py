"""Cases of the kernels between the passes of a round: what is written in place, walked and grown.

Most of them move or choose numbers, and must do so exactly: what is compared is the share that is
right.
"""

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from scripts.gpu import inputs
from scripts.gpu.case import Case, Outputs
from scripts.gpu.geometry import Geometry
from scripts.gpu.trees import bush
from specdec.draft.candidates import as_block
from specdec.kernels.attention import AttentionLayout
from specdec.kernels.attention_inputs import attention_inputs, staged_inputs
from specdec.kernels.gpu.attention import path_table, paths
from specdec.kernels.gpu.grown import grown
from specdec.kernels.gpu.in_place import write_in_place
from specdec.kernels.gpu.kept_rows import kept_rows
from specdec.kernels.layout import TreeLayout
from specdec.kernels.tapped import tapped_rows
from specdec.kernels.top_tokens import top_tokens, verdict
from specdec.kernels.walked import came_before, walked
from specdec.tree.build import build

LENGTH, CAPACITY = 300, 512
FLOATS = (mx.float32, mx.bfloat16)


def exact(
    op: str, words: str, dtype: mx.Dtype, run: Callable[[], Any], expected: Callable[[], Any]
) -> Case:
    """A case whose outputs are to be those expected, to the bit."""

    def shares() -> Outputs:
        """Of each output, how much is right."""
        pairs = [(mx.array(a), mx.array(b)) for a, b in zip(run(), expected(), strict=True)]
        assert all(a.shape == b.shape for a, b in pairs)
        return [mx.stack([(a == b).astype(mx.float32).mean() for a, b in pairs])[None]]

    return Case(op, words, dtype, shares, lambda: [mx.ones((1, len(expected())))])


def top_case(dtype: mx.Dtype, rows: int, vocabulary: int, width: int) -> Case:
    logits = inputs.normal(dtype, rows, vocabulary)
    host = np.array(logits.astype(mx.float32))
    best = np.argsort(-host, axis=1, kind="stable")[:, :width]

    def run() -> Outputs:
        found = top_tokens(logits, width)
        totals = mx.contiguous(found[:, 2 * width : 2 * width + 2]).view(mx.float32)
        right = (found[:, :width] == mx.array(best)).astype(mx.float32)
        chosen = (verdict(logits)[:, :1] == mx.array(best[:, :1])).astype(mx.float32)
        return [right, chosen, totals[:, :1] + mx.log(totals[:, 1:])]

    def reference() -> Outputs:
        total = mx.logsumexp(logits.astype(mx.float32), axis=-1, keepdims=True)
        return [mx.ones((rows, width)), mx.ones((rows, 1)), total]

    return Case("top_tokens", f"{rows} x {vocabulary}, {width} best", dtype, run, reference)


def walk_case(rows: int) -> Case:
    rng = np.random.default_rng(rows)
    tokens, best = rng.integers(0, 2, rows), rng.integers(0, 2, rows)
    tree = mx.array(np.concatenate([tokens, bush(rows)]).astype(np.int32))
    numbers = mx.array(rng.integers(-9, 99, 1 + 2 + 2 * 16 + 4 * 16 * 2 + 1).astype(np.int32))
    found = mx.array(np.stack([best, best], axis=1).astype(np.int32))

    def call() -> Outputs:
        return list(walked(found, tree, numbers, 2, 16))

    reference = walked.reference  # type: ignore[attr-defined]
    return exact(
        "walked", f"{rows} rows", mx.float32, call, lambda: reference(found, tree, numbers, 2, 16)
    )


def grown_case(slots: int, rows: int, taps: int) -> Case:
    logits = inputs.normal(mx.float32, slots, 4096, scale=3.0)
    found = top_tokens(logits, rows - 1)
    turn = inputs.normal(mx.float32, slots + 4, 32), inputs.normal(mx.float32, slots + 4, 32)
    came = came_before(7, LENGTH)
    came[0] = 3
    expected = build(7, as_block(np.array(found)), rows - 1)
    layout = AttentionLayout(TreeLayout(expected.parents), LENGTH)

    def call() -> Outputs:
        made = grown(found, mx.array(came), turn, rows, taps)
        program = made.program[1:].reshape(rows, 4 + taps)
        windows = program[:, 4:][mx.argsort(program[:, 0])]
        return [made.tree[: 2 * rows], made.paths, windows, *made.turn]

    def right() -> list[np.ndarray]:
        tree, depths = np.concatenate([expected.tokens, expected.parents]), layout.tree.depths
        turned = (np.array(table)[3 + depths] for table in turn)
        return [tree, path_table(layout), layout.tree.windows(taps), *turned]

    return exact("grown", f"{rows} rows of {slots} slots, {taps} taps", mx.float32, call, right)


def staged_case(dtype: mx.Dtype, g: Geometry, rows: int) -> Case:
    shape, (q, k, v) = inputs.attention_shape(dtype, g), inputs.attention_pieces(dtype, g, rows)
    turn = inputs.turns(g, np.arange(rows) + LENGTH)
    size = g.num_key_value_heads, CAPACITY, g.head_dim
    before = [inputs.normal(dtype, *size) for _ in range(2)]
    tree = paths(AttentionLayout(TreeLayout(bush(rows)), LENGTH))

    def call() -> Outputs:
        buffers = before[0] * 1, before[1] * 1  # others each time: they are written into
        mx.eval(buffers)
        with write_in_place():
            made = staged_inputs(q, k, v, shape, *turn, buffers, tree, mx.zeros(8, dtype))
        mx.eval(made.queries)
        return [made.queries, *buffers]

    def right() -> Outputs:
        queries, *new = attention_inputs(q, k, v, shape, *turn)
        filled = [
            mx.slice_update(old, rows_of, mx.array([LENGTH]), axes=(1,))
            for old, rows_of in zip(before, new, strict=True)
        ]
        return [queries, *filled]

    words = f"{rows} rows, {size[0]} heads of {size[2]}"
    return exact("staged_inputs", words, dtype, call, right)


def kept_case(dtype: mx.Dtype, g: Geometry, layers: int, path: list[int]) -> Case:
    size = g.num_key_value_heads, CAPACITY, g.head_dim
    before = [inputs.normal(dtype, *size) for _ in range(2 * layers)]
    numbers = mx.array([len(path), *path, *[0] * (32 - len(path))], mx.int32)

    def call() -> Outputs:
        buffers = [one * 1 for one in before]
        mx.eval(buffers)
        tree = mx.array([[LENGTH, LENGTH, *[0] * 6]], mx.int32)
        mx.eval(kept_rows(buffers[::2], buffers[1::2], numbers, tree, mx.zeros(8, dtype)))
        return buffers

    def right() -> Outputs:
        rows = mx.array([LENGTH + row for row in path])
        return [mx.slice_update(b, b[:, rows], mx.array([LENGTH]), axes=(1,)) for b in before]

    return exact("kept_rows", f"{layers} layers, path of {len(path)}", dtype, call, right)


def tapped_case(dtype: mx.Dtype, parts: int, width: int) -> Case:
    of = [inputs.normal(dtype, 17, width) for _ in range(parts)]
    rows = mx.array([0, 3, 16, 2], mx.int32)
    reference = tapped_rows.reference  # type: ignore[attr-defined]
    return exact(
        "tapped_rows",
        f"{parts} parts of {width}",
        dtype,
        lambda: [tapped_rows(of, rows)],
        lambda: [reference(of, rows)],
    )


def round_cases(g: Geometry, real: bool) -> Iterator[Callable[[], Case]]:
    vocabulary = 248_320 if real else 777
    for dtype in FLOATS:
        yield lambda d=dtype: top_case(d, 7, vocabulary, 16)  # type: ignore[misc]
        yield lambda d=dtype: tapped_case(d, 5, g.hidden_size)  # type: ignore[misc]
        for rows in (1, 7, 17):
            yield lambda d=dtype, r=rows: staged_case(d, g, r)  # type: ignore[misc]
        yield lambda d=dtype: kept_case(d, g, 10, [0, 2, 3, 9])  # type: ignore[misc]
    for rows in (2, 7, 32):
        yield lambda r=rows: walk_case(r)  # type: ignore[misc]
    for slots, rows, taps in ((7, 7, 4), (15, 17, 4), (4, 32, 2)):
        yield lambda s=slots, r=rows, t=taps: grown_case(s, r, t)  # type: ignore[misc]
