"""Tapped rows on a GPU: gathered and put side by side, by one launch for up to 8 parts."""

from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.limits import FLOATS, MAX_ROWS, Unsupported

MOST = 8  # parts of a launch

TAPPED = MetalKernel(
    "tapped",
    inputs=("rows", *(f"part{i}" for i in range(MOST))),
    outputs=("out",),
    template=("T", "PARTS"),
)


def tapped_rows(parts: Sequence[mx.array], rows: mx.array) -> mx.array:
    first, count = parts[0], len(parts)
    if count > MOST:
        runs = [tapped_rows(parts[at : at + MOST], rows) for at in range(0, count, MOST)]
        return mx.concatenate(runs, axis=-1)
    launch = _launch(count, first.shape[1], first.dtype, rows.shape[0])
    (out,) = launch(rows, *parts, *[first] * (MOST - count))
    return out


@cache
def _launch(parts: int, width: int, dtype: mx.Dtype, rows: int) -> Launch:
    if dtype not in FLOATS or not 1 <= rows <= MAX_ROWS:
        raise Unsupported(f"kernel tapped: {rows} rows of {dtype}, expected 1 to {MAX_ROWS} floats")
    return TAPPED.launch(
        [(rows, parts * width)],
        [dtype],
        grid=(-(-width // 64) * 64, parts, rows),
        threadgroup=(64, 1, 1),
        template={"T": dtype, "PARTS": parts},
    )
