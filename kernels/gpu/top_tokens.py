"""The best tokens of every row on a GPU: one launch, and another for large vocabularies."""

from functools import cache

import mlx.core as mx

from specdec.kernels.gpu.kernel import Launch, MetalKernel
from specdec.kernels.gpu.limits import FLOATS, MAX_ROWS, Unsupported

MAX_WIDTH = 64
THREADS = 1024  # of a threadgroup, at most
VALUES = 8  # logits of a thread
MOST = 4 * THREADS  # candidates that are merged

TOP = MetalKernel(
    "top_tokens",
    inputs=("logits",),
    outputs=("top",),
    template=("T", "WIDTH", "VALUES", "VERDICT"),
    helpers=("order_key.h", "top.h"),
)
MERGE = MetalKernel(
    "top_merge",
    inputs=("parts",),
    outputs=("top",),
    template=("WIDTH", "VALUES", "VERDICT"),
    helpers=("order_key.h", "top.h"),
)


def top_tokens(logits: mx.array, width: int) -> mx.array:
    return _run(logits, width, False)


def verdict(logits: mx.array) -> mx.array:
    return _run(logits, 1, True)


def _run(logits: mx.array, width: int, verdict: bool) -> mx.array:
    first, merge = _launches(logits.shape, logits.dtype, width, verdict)
    (top,) = first(logits)
    if merge is not None:
        (top,) = merge(top)
    return top


@cache
def _launches(
    shape: tuple[int, int], dtype: mx.Dtype, width: int, verdict: bool
) -> tuple[Launch, Launch | None]:
    rows, vocab = shape
    if dtype not in FLOATS:
        raise Unsupported(f"kernel top_tokens: logits of {dtype}, expected floats")
    if not 1 <= rows <= MAX_ROWS:
        raise Unsupported(f"kernel top_tokens: {rows} rows, expected 1 to {MAX_ROWS}")
    if not 1 <= width <= MAX_WIDTH:
        raise Unsupported(f"kernel top_tokens: width {width}, expected 1 to {MAX_WIDTH}")
    threads = min(THREADS, 32 * -(-vocab // (32 * VALUES)))
    parts = -(-vocab // (VALUES * threads))
    if parts * width > MOST:
        raise Unsupported(f"kernel top_tokens: {width} of {vocab} logits, expected fewer")
    last = (rows, 2) if verdict else (rows, 2 * width + 3)
    first = TOP.launch(
        [last if parts == 1 else (rows, parts, 2 * width + 3)],
        [mx.int32],
        grid=(threads * parts, rows, 1),
        threadgroup=(threads, 1, 1),
        template={"T": dtype, "WIDTH": width, "VALUES": VALUES, "VERDICT": verdict and parts == 1},
    )
    if parts == 1:
        return first, None
    threads = min(THREADS, 32 * -(-parts * width // 32))
    values = -(-parts * width // threads)
    merge = MERGE.launch(
        [last],
        [mx.int32],
        grid=(threads, rows, 1),
        threadgroup=(threads, 1, 1),
        template={"WIDTH": width, "VALUES": values, "VERDICT": verdict},
    )
    return first, merge
