"""The sample kernels of tests/metal as cases: what they compute on a GPU is what the shim says."""

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from scripts.gpu.case import Case, Outputs
from scripts.gpu.inputs import normal, wide
from tests.metal.samples import RMS_NORM, ROW_SUM, WORDS
from tests.metal.test_samples import words


def cases() -> Iterator[Callable[[], Case]]:
    yield words_case
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        yield lambda d=dtype: sum_case(d)  # type: ignore[misc]
        yield lambda d=dtype: norm_case(d)  # type: ignore[misc]


def words_case() -> Case:
    launch = WORDS.launch([(24, 32)], [mx.float32], (32, 1, 1), (32, 1, 1))
    x = mx.arange(32, dtype=mx.uint32)

    # each word by itself: a wrong one must not hide behind the greatest value
    def run() -> Outputs:
        return list(launch(x)[0])

    def reference() -> Outputs:
        return [mx.array(row) for row in words().astype(np.float32)]

    return Case("WORDS", "24 x 32", mx.float32, run, reference)


def sum_case(dtype: mx.Dtype) -> Case:
    rows, columns, threads = 5, 1001, 256
    x = normal(dtype, rows, columns)
    launch = ROW_SUM.launch(
        [(rows,)],
        [dtype],
        (rows * threads, 1, 1),
        (threads, 1, 1),
        {"T": dtype, "THREADS": threads},
    )
    return Case(
        "ROW_SUM",
        f"{rows} x {columns}",
        dtype,
        lambda: launch(x, mx.array([columns])),
        lambda: [wide(x).sum(axis=1)],
    )


def norm_case(dtype: mx.Dtype) -> Case:
    x, weight = normal(dtype, 5, 45), normal(dtype, 45)
    launch = RMS_NORM.launch([x.shape], [dtype], (64 * 3, 1, 1), (64, 1, 1), {"T": dtype})
    return Case(
        "RMS_NORM",
        "5 x 45",
        dtype,
        lambda: launch(x, weight, mx.array([1e-6])),
        lambda: [mx.fast.rms_norm(wide(x), wide(weight), 1e-6)],
    )
