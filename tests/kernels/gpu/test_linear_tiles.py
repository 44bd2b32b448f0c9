"""Linear layers on matrix units against float64 products of decoded matrices."""

import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels.gpu import linear as gpu
from specdec.kernels.gpu.linear_tiles import LINEAR_TILES, _cut, linear_tiles
from specdec.kernels.gpu.tiles import use_tiles
from tests.backends import same_bits
from tests.kernels.gpu.arrays import exact
from tests.kernels.gpu.products import DTYPES, Problem, bits_of
from tests.metal.build import compiler
from tests.metal.cuda import cuda_source
from tests.metal.rules import broken_rules
from tests.metal.run import through_shim

needs_shim = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")

# bits, group size, rows, inputs, outputs (not whole tiles), norm, residual
CASES = [
    (4, 64, 7, 256, 37, True, True),
    (4, 64, 1, 128, 16, False, False),
    (4, 32, 11, 224, 19, True, False),
    (4, 128, 3, 256, 5, True, True),
    (8, 64, 8, 192, 17, True, True),
    (8, 32, 20, 64, 33, False, True),
    (8, 128, 2, 256, 9, True, False),
    (0, 0, 7, 288, 40, True, True),
    (0, 0, 32, 64, 16, False, False),
]


def short(case) -> Problem:
    bits, group, rows, size, out, norm, residual = case
    return Problem(bits, group, rows, size, out, norm, residual, mx.bfloat16)


@pytest.fixture(autouse=True)
def always_tiles(monkeypatch):
    """Small matrices, too."""
    monkeypatch.setattr(gpu, "LARGE", 1)
    gpu._linear.cache_clear()
    with use_tiles():
        yield
    gpu._linear.cache_clear()


@needs_shim
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_on_matrix_units_are_products(case):
    problem = short(case)
    forward, reverse = problem.run(), problem.run(order="reverse")
    assert forward.dtype == mx.bfloat16
    assert same_bits(bits_of(forward), bits_of(reverse))
    atol = DTYPES[mx.bfloat16] * np.abs(problem.expected).max()
    np.testing.assert_allclose(exact(forward), problem.expected, rtol=0, atol=atol)


@needs_shim
def test_codes_are_multiplied_exactly():
    """Whole numbers: what is subtracted for OFFSET leaves nothing behind."""
    for bits in (4, 8):
        problem = Problem(bits, 32, 3, 128, 16, False, False, mx.bfloat16)
        weight = problem.weight
        one, zero = mx.ones_like(weight.scales), mx.zeros_like(weight.biases)
        whole = type(weight)(weight.data, one, zero, bits, 32)
        codes = exact(mx.dequantize(weight.data, one, zero, group_size=32, bits=bits))
        x = mx.array(np.random.default_rng(bits).integers(-9, 10, (3, 128))).astype(mx.bfloat16)
        with through_shim():
            out = gpu.linear(x, whole)
        expected = mx.array((exact(x) @ codes.T).astype(np.float32)).astype(mx.bfloat16)
        assert same_bits(bits_of(out), bits_of(expected))


@needs_shim
@pytest.mark.parametrize("sanitize", ["memory", "races"])
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[7]], ids=str)
def test_no_access_out_of_bounds_and_no_race(case, sanitize):
    problem = short(case)
    assert same_bits(bits_of(problem.run(sanitize=sanitize)), bits_of(problem.run()))


@needs_shim
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_has_the_same_bits_in_any_company(case):
    """Alone, among others, in another order: variants for 1, 2 and 4 tiles of rows."""
    bits, group, _, size, out, norm, residual = case
    problem = Problem(bits, group, 32, size, out, norm, residual, mx.bfloat16)
    together = bits_of(problem.run())
    rng = np.random.default_rng(1)
    for count in (1, 7, 12):
        rows = rng.permutation(32)[:count]
        assert same_bits(bits_of(problem.run(mx.array(rows))), together[rows])


@given(
    groups=st.integers(1, 200),
    outs=st.integers(1, 300_000),
    rows=st.lists(st.integers(1, 32), min_size=2, max_size=2),
)
@settings(deadline=None, max_examples=200)
def test_the_order_of_addition_does_not_depend_on_rows(groups, outs, rows):
    (split, _, unroll, tiles), (other, *_) = (_cut(groups, outs, count) for count in rows)
    assert split == other
    assert groups % (split * unroll) == 0
    assert 8 * tiles >= rows[0]


def test_large_matrices_only_and_only_where_tiles_are_on():
    def kernel(outs, on=True):
        return gpu._linear(
            *((7, 2048), mx.bfloat16, (outs, 256), mx.bfloat16, 4, 64, None, None), on
        ).kernel.name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "LARGE", 1 << 19)
        gpu._linear.cache_clear()
        assert [kernel(255), kernel(256), kernel(256, on=False)] == [
            "linear",
            "linear_tiles",
            "linear",
        ]
        gpu._linear.cache_clear()


def test_the_text_keeps_the_rules():
    assert not broken_rules(LINEAR_TILES)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    ("bits", "rows", "outs"),
    [
        (4, 7, 12352),
        (4, 16, 248320),
        (4, 32, 2048),
        (8, 16, 257),
        (8, 7, 8192),
        (0, 8, 8192),
    ],
)
def test_the_text_compiles_for_cuda_without_spills(bits, rows, outs, tmp_path):
    dtype = mx.bfloat16
    launch = linear_tiles(rows, 2048, outs, dtype, bits, 64 if bits else 0, True, True)
    arrays = [dtype, mx.uint32 if bits else dtype, dtype, dtype, dtype, mx.float32, dtype]
    source, target = tmp_path / "linear.cu", tmp_path / "linear.cubin"
    source.write_text(cuda_source(LINEAR_TILES, arrays, [dtype], dict(launch.template)))
    flags = ["-arch=sm_90", "-std=c++17", "-cubin", "-Werror=all-warnings", "-Xptxas=-v"]
    command = ["nvcc", *flags, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr, done.stderr
