"""Rows of several arrays side by side, by the kernel and by its reference."""

import mlx.core as mx
import numpy as np
import pytest

from specdec.kernels.gpu import tapped as gpu
from specdec.kernels.gpu.limits import Unsupported
from specdec.kernels.tapped import Taps
from tests.metal.build import compiler
from tests.metal.rules import broken_rules
from tests.metal.run import through_shim


@pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")
@pytest.mark.parametrize(("parts", "width"), [(1, 64), (3, 96), (8, 33), (9, 32)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_rows_of_all_parts(parts, width, dtype):
    rng = np.random.default_rng(parts)
    arrays = [mx.array(rng.standard_normal((7, width))).astype(dtype) for _ in range(parts)]
    rows = [0, 6, 3, 3]
    with through_shim(sanitize="memory"):
        found = gpu.tapped_rows(arrays, mx.array(rows, mx.int32))
    assert found.dtype == dtype
    assert mx.array_equal(found, Taps(arrays, rows).values)
    assert mx.array_equal(Taps(arrays).values, Taps(arrays, range(7)).values)
    assert (len(Taps(arrays)), len(Taps(arrays, rows))) == (7, 4)


def test_rules_and_what_is_not_taken():
    assert broken_rules(gpu.TAPPED) == []
    with pytest.raises(Unsupported, match="33 rows"):
        gpu.tapped_rows([mx.zeros((1, 4))], mx.array([0] * 33))
