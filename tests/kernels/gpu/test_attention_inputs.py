"""Queries, keys and values by heads as a GPU kernel, on the CPU shim; their way into buffers."""

import shutil
import subprocess
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from specdec.kernels.attention import AttentionLayout
from specdec.kernels.attention_inputs import AttentionShape, Staged, staged_inputs
from specdec.kernels.gpu import attention_inputs as gpu
from specdec.kernels.gpu.attention import paths
from specdec.kernels.gpu.in_place import write_in_place
from specdec.kernels.gpu.kept_rows import KEPT_ROWS, LAYERS, kept_rows
from specdec.kernels.gpu.limits import Unsupported
from specdec.kernels.layout import TreeLayout
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm
from tests.kernels.gpu.arrays import exact, random
from tests.metal.build import compiler
from tests.metal.cuda import cuda_source
from tests.metal.rules import broken_rules
from tests.metal.run import through_shim

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")
NVCC = shutil.which("nvcc")

CLOSE = {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 1.5e-2}  # for results of about 1


def pieces(rows, heads, kv_heads, dim, gated, dtype, seed=0):
    """Three pieces of one fused projection; the columns before and behind them are nobody's."""
    widths = [heads * dim * (2 if gated else 1), kv_heads * dim, kv_heads * dim]
    starts = np.cumsum([3, *widths])
    fused = random((rows, int(starts[-1]) + 5), seed, dtype)
    return [Piece(fused, int(s), w) for s, w in zip(starts, widths, strict=False)]


def shape_of(heads, kv_heads, dim, gated, dtype):
    weights = random((2, dim), 9, dtype)
    return AttentionShape(
        heads, kv_heads, dim, gated, Norm(weights[0], 1e-6), Norm(weights[1], 1e-2)
    )


def angles(rows, half):
    turns = np.random.default_rng(5).uniform(0, 6, (rows, half))
    return mx.array(np.cos(turns).astype(np.float32)), mx.array(np.sin(turns).astype(np.float32))


def expected_inputs(queries, keys, values, shape, cos, sin):
    """In float64."""
    rows, half = cos.shape
    q = exact(queries.values).reshape(rows, shape.heads, -1)[..., : shape.dim]
    k, v = (exact(p.values).reshape(rows, shape.kv_heads, shape.dim) for p in (keys, values))
    results = []
    for x, norm in ((q, shape.q_norm), (k, shape.k_norm)):
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * exact(norm.weight)
        x = x.swapaxes(0, 1)
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        c, s = exact(cos), exact(sin)
        results.append(np.concatenate([a * c - b * s, b * c + a * s, rest], -1))
    return [*results, v.swapaxes(0, 1)]


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "dim", "gated", "half", "sanitize"),
    [
        (7, 4, 2, 64, True, 8, None),
        (3, 6, 1, 96, False, 48, "memory"),
        (1, 2, 2, 64, True, 2, "races"),
    ],
)
def test_inputs(rows, heads, kv_heads, dim, gated, half, sanitize, dtype):
    shape = shape_of(heads, kv_heads, dim, gated, dtype)
    arguments = (*pieces(rows, heads, kv_heads, dim, gated, dtype), shape, *angles(rows, half))
    with through_shim(sanitize=sanitize):
        found = gpu.attention_inputs(*arguments)
    for got, want in zip(found, expected_inputs(*arguments), strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(exact(got), want, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    np.testing.assert_array_equal(exact(found[2]), expected_inputs(*arguments)[2])


def test_inputs_of_a_row_do_not_depend_on_the_others():
    shape = shape_of(4, 2, 64, True, mx.float32)
    q, k, v = pieces(7, 4, 2, 64, True, mx.float32)
    cos, sin = angles(7, 16)
    order = np.random.default_rng(2).permutation(7)

    def of(rows):
        rows = mx.array(rows)
        a, b, c = (Piece(mx.contiguous(p.rows[rows]), p.start, p.width) for p in (q, k, v))
        with through_shim(order="reverse"):
            return gpu.attention_inputs(a, b, c, shape, cos[rows], sin[rows])

    together, shuffled = of(np.arange(7)), of(order)
    for a, b in zip(together, shuffled, strict=True):
        np.testing.assert_array_equal(exact(a)[:, order], exact(b))
    for row in (0, 6):
        for a, b in zip(together, of([row]), strict=True):
            np.testing.assert_array_equal(exact(a)[:, [row]], exact(b))


def staged_case(dtype, rows=7, length=5) -> tuple[Any, Any, mx.array]:
    """Arguments of staged_inputs but the buffers, and these."""
    shape = shape_of(4, 2, 64, True, dtype)
    tree = paths(AttentionLayout(TreeLayout.chain(rows), length))
    arguments = (*pieces(rows, 4, 2, 64, True, dtype), shape, *angles(rows, 16))
    buffers = random((2, 16, 64), 21, dtype), random((2, 16, 64), 22, dtype)
    mx.eval(buffers)
    return arguments, buffers, tree


@pytest.mark.parametrize("sanitize", [None, "memory", "races"])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_keys_and_values_are_written_behind_the_committed_ones(dtype, sanitize):
    arguments, buffers, tree = staged_case(dtype)
    before = [exact(buffer) for buffer in buffers]
    order = mx.zeros(8, dtype)
    given = (*arguments, buffers, tree, order)
    with through_shim(sanitize=sanitize):
        queries, keys, values = gpu.attention_inputs(*arguments)
        with write_in_place(False):
            through_mlx = gpu.staged_inputs(*given)
        assert all((exact(x) == y).all() for x, y in zip(buffers, before, strict=True))
        with write_in_place():
            staged = gpu.staged_inputs(*given)
    assert staged.rows is None
    assert staged.done.shape == order.shape
    assert (staged.keys, staged.values) == buffers
    for old, filled, other, new in zip(
        before, buffers, (through_mlx.keys, through_mlx.values), (keys, values), strict=True
    ):
        old[:, 5:12] = exact(new)
        np.testing.assert_array_equal(exact(filled), old)
        np.testing.assert_array_equal(exact(other), old)
    for found in (staged, through_mlx):
        np.testing.assert_array_equal(exact(found.queries), exact(queries))


def test_the_reference_writes_the_same_rows():
    arguments, buffers, tree = staged_case(mx.float32, rows=3)
    given = (*arguments, buffers, tree, mx.zeros(8))
    operation: Any = staged_inputs
    reference: Staged = operation.reference(*given)
    with through_shim(), write_in_place():
        gpu.staged_inputs(*given)
    for found, expected in zip(buffers, (reference.keys, reference.values), strict=True):
        np.testing.assert_allclose(exact(found), exact(expected), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("path", "sanitize"),
    [
        ([0, 2, 3], "memory"),
        ([0, *range(20, 29)], "races"),
        ([0, 1, 2], None),
        ([0], None),
        (list(range(0, 27, 2)), None),
    ],
)
def test_a_path_is_moved_to_the_front(path, sanitize):
    """More layers than a launch has; rows before and behind stay what they are."""
    layers = LAYERS + 2 if sanitize is None else 2
    buffers = [random((2, 40, 32), 30 + i, mx.bfloat16) for i in range(2 * layers)]
    mx.eval(buffers)
    expected = [exact(buffer) for buffer in buffers]
    for one in expected:
        one[:, 7 : 7 + len(path)] = one[:, [7 + row for row in path]]
    numbers = mx.array([len(path), *path, *[0] * (32 - len(path))], mx.int32)
    with through_shim(sanitize=sanitize):
        kept_rows(
            buffers[::2], buffers[1::2], numbers, mx.array([[9, 7]]), mx.zeros(8, mx.bfloat16)
        )
    for found, wanted in zip(buffers, expected, strict=True):
        np.testing.assert_array_equal(exact(found), wanted)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "words"),
    [(4, 2, 288, "head dim 288"), (4, 2, 80, "head dim 80"), (17, 1, 64, "17 heads")],
)
def test_what_is_not_supported(heads, kv_heads, dim, words):
    shape = shape_of(heads, kv_heads, dim, False, mx.float32)
    q, k, v = pieces(1, heads, kv_heads, dim, False, mx.float32)
    with pytest.raises(Unsupported, match=words), through_shim():
        gpu.attention_inputs(q, k, v, shape, *angles(1, 4))


def test_buffers_of_another_type_are_refused():
    arguments, _, tree = staged_case(mx.float32)
    buffers = (mx.zeros((2, 16, 64), mx.bfloat16),) * 2
    given = (*arguments, buffers, tree, mx.zeros(8))
    with pytest.raises(Unsupported, match="bfloat16"), through_shim(), write_in_place():
        gpu.staged_inputs(*given)


# ---- the text


@pytest.mark.parametrize("kernel", [gpu.INPUTS, KEPT_ROWS], ids=lambda k: k.name)
def test_rules(kernel):
    assert broken_rules(kernel) == []


def sources():
    b, f, i = mx.bfloat16, mx.float32, mx.int32
    inputs = [b, b, b, i, b, b, f, f, f, f, b, b, i, b]
    for staged in (False, True):
        yield cuda_source(gpu.INPUTS, inputs, [b] * 3, {"T": b, "DIM": 256, "STAGED": staged})
    yield cuda_source(KEPT_ROWS, [i, i, *[b] * 2 * LAYERS, b], [b], {"T": b, "DIM": 64})


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", sources())
def test_cuda_compiles(source, tmp_path):
    (tmp_path / "kernel.cu").write_text(source)
    flags = ["-arch=sm_90", "-std=c++17", "-cubin", "-Werror=all-warnings"]
    command = [str(NVCC), *flags, str(tmp_path / "kernel.cu"), "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
