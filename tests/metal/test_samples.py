"""Good kernels give right results on the shim, in every type, at odd sizes, in both orders."""

import mlx.core as mx
import numpy as np
import pytest

from specdec.kernels.gpu.kernel import MetalKernel
from tests.metal.build import compiler
from tests.metal.run import Order, run_msl, through_shim
from tests.metal.samples import RMS_NORM, ROW_SUM, WORDS

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")

DTYPES = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}  # rounding of one result
ORDERS: tuple[Order, ...] = ("forward", "reverse")


def random(shape, dtype, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return mx.array(values).astype(dtype)


def exact(x):
    return np.array(x.astype(mx.float32)).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns", "threads"), [(1, 1, 32), (3, 77, 64), (5, 1001, 256)])
def test_row_sum(rows, columns, threads, dtype):
    x = random((rows, columns), dtype)
    forward, reverse = (
        run_msl(
            ROW_SUM,
            [x, mx.array([columns])],
            [(rows,)],
            [dtype],
            (rows * threads, 1, 1),
            (threads, 1, 1),
            {"T": dtype, "THREADS": threads},
            order=order,
        )[0]
        for order in ORDERS
    )
    np.testing.assert_array_equal(forward, reverse)
    scale = np.abs(exact(x)).sum(1).max()
    np.testing.assert_allclose(forward, exact(x).sum(1), rtol=0, atol=DTYPES[dtype] * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sanitize", [None, "memory", "races"])
def test_rms_norm_through_its_launch(dtype, sanitize):
    x, weight = random((5, 45), dtype), random((45,), dtype, 1)
    with through_shim(sanitize=sanitize):
        launch = RMS_NORM.launch(
            [x.shape],
            [dtype],
            grid=(64 * 3, 1, 1),
            threadgroup=(64, 1, 1),
            template={"T": dtype},
        )
        (out,) = launch(x, weight, mx.array([1e-6]))
    assert out.dtype == dtype
    expected = exact(x) / np.sqrt((exact(x) ** 2).mean(1, keepdims=True) + 1e-6) * exact(weight)
    np.testing.assert_allclose(exact(out), expected, rtol=DTYPES[dtype], atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sanitize", [None, "memory", "races"])
def test_every_word_of_the_vocabulary(order, sanitize):
    x = mx.arange(32, dtype=mx.uint32)
    (out,) = run_msl(
        WORDS,
        [x],
        [(24, 32)],
        [mx.float32],
        (32, 1, 1),
        (32, 1, 1),
        order=order,
        sanitize=sanitize,
    )
    np.testing.assert_allclose(out, words(), rtol=2e-6)


def words() -> np.ndarray:
    """What samples/words.metal writes."""
    lane = np.arange(32)
    own = lane + 1.0
    pair = np.stack([own[:16], -own[:16]], 1).ravel()
    third = own / 3
    where = 3 * lane - lane + 32 + 32 + 1 + 1  # positions add to 2 lanes, sizes to 66
    rows = [
        np.full(32, own.sum()),
        np.full(32, 32.0),
        np.full(32, 1.0),
        own[(lane + 5) % 32],
        np.full(32, own[7]),
        np.full(32, own[0]),
        own[lane ^ 3],
        own[np.where(lane + 4 < 32, lane + 4, lane)],
        own[np.where(lane >= 4, lane - 4, lane)],
        own.cumsum(),
        own.cumsum() - own,
        np.ones(32),
        np.zeros(32),
        own[::-1],
        (16 * (lane % 8) + 6).astype(float),
        pair,
        own,
        np.exp(-own) + np.exp2(-own) + np.log(own) + np.log2(own),
        np.sqrt(own) + 1 / np.sqrt(own) + np.tanh(own) + own**2,
        np.sin(own) + np.cos(own) + own * 2 + 1,
        np.floor(third) + np.ceil(third) + np.rint(third),
        own + np.clip(own, 3, 9) + np.where(own > 4, 2, 1),
        np.minimum(own, 7) + np.maximum(own, 7) + [int(i).bit_count() for i in lane],
        1 + 2 * np.exp(-own) + lane + 1 + where,
    ]
    return np.stack(rows)


def test_half_and_bfloat_round_like_mlx(tmp_path):
    """All operations on pairs of numbers, subnormal, huge, infinite and NaN ones among them."""
    (tmp_path / "pairs.metal").write_text(
        "uint i = thread_position_in_grid.x;\n"
        "out[4 * i] = a[i] + b[i];\nout[4 * i + 1] = a[i] - b[i];\n"
        "out[4 * i + 2] = a[i] * b[i];\nout[4 * i + 3] = a[i] / b[i];\n"
    )
    kernel = MetalKernel("pairs", ("a", "b"), ("out",), folder=tmp_path)
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**16, (2, 4096), np.uint16)
    for dtype in (mx.float16, mx.bfloat16):
        a, b = (mx.array(x).view(dtype) for x in bits)
        (out,) = run_msl(kernel, [a, b], [(4096, 4)], [dtype], (4096, 1, 1), (64, 1, 1))
        wide = [x.astype(mx.float32) for x in (a, b)]
        results = [wide[0] + wide[1], wide[0] - wide[1], wide[0] * wide[1], wide[0] / wide[1]]
        expected = mx.stack(results, axis=1).astype(dtype).astype(mx.float32)
        np.testing.assert_array_equal(out.astype(np.float32), np.array(expected))


@pytest.mark.parametrize("attribute", ["x", "y", "z"])
def test_thread_attributes_at_the_edges_of_a_grid(attribute, tmp_path):
    """A grid of (5, 3, 2) threads in groups of (4, 2, 1), as Apple GPUs cut it."""
    names = ["thread_position_in_grid", "thread_position_in_threadgroup", "threads_per_grid"]
    names += ["threadgroup_position_in_grid", "threads_per_threadgroup", "threadgroups_per_grid"]
    names += ["dispatch_threads_per_threadgroup"]
    (tmp_path / "places.metal").write_text(
        "uint3 p = thread_position_in_grid;\nuint i = p.x + 5 * (p.y + 3 * p.z);\n"
        + "".join(f"out[8 * i + {n}] = {name}.{attribute};\n" for n, name in enumerate(names))
        + "out[8 * i + 7] = thread_index_in_threadgroup;\n"
    )
    kernel = MetalKernel("places", ("a",), ("out",), folder=tmp_path).on_metal()
    (out,) = run_msl(kernel, [mx.zeros(1)], [(2, 3, 5, 8)], [mx.uint32], (5, 3, 2), (4, 2, 1))
    axis = "xyz".index(attribute)
    grid, group = np.array([5, 3, 2]), np.array([4, 2, 1])
    for z, y, x in np.ndindex(2, 3, 5):
        at = np.array([x, y, z])
        size = np.minimum(group, grid - at // group * group)
        local = at % group
        index = local[0] + size[0] * (local[1] + size[1] * local[2])
        values = [at, local, grid, at // group, size, -(-grid // group), group]
        assert out[z, y, x].tolist() == [v[axis] for v in values] + [index]
