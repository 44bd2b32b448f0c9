"""The kernels of linear layers and the embedding against float64 products of decoded matrices."""

import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from specdec.kernels import linear as reference
from specdec.kernels.gpu import linear as gpu
from specdec.kernels.gpu.kernel import Template
from specdec.kernels.gpu.limits import Unsupported
from specdec.kernels.norm import Norm
from specdec.kernels.weight import Weight
from tests.backends import same_bits
from tests.kernels.gpu.arrays import exact
from tests.kernels.gpu.products import DTYPES, Problem, as_dtype, bits_of
from tests.kernels.weights import dense, normal, packed, some_weight
from tests.metal.build import compiler
from tests.metal.cuda import cuda_source
from tests.metal.rules import broken_rules
from tests.metal.run import through_shim

needs_shim = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")

# One of each: bits, group size, rows, inputs (not all lanes have as many), outputs, norm, residual
CASES = [
    (2, 32, 1, 96, 5, True, False),
    (2, 128, 7, 640, 3, False, True),
    (3, 64, 2, 1152, 5, True, True),
    (4, 32, 3, 32, 9, False, False),
    (4, 64, 7, 1088, 5, True, False),
    (4, 128, 1, 512, 4, False, True),
    (5, 32, 5, 1056, 3, False, False),
    (6, 64, 13, 576, 3, True, True),
    (8, 32, 32, 544, 2, True, False),
    (8, 128, 7, 256, 1, False, False),
    (0, 0, 1, 8, 1, False, False),
    (0, 0, 7, 1000, 5, True, True),
    (4, 64, 7, 4096, 3, True, True),
    (8, 64, 32, 2048, 5, True, False),
    (0, 0, 3, 2056, 2, False, True),
]


@pytest.fixture
def side_by_side(monkeypatch):
    """Sets how many features a simdgroup computes, for the rest of a test."""

    def choose(features):
        monkeypatch.setattr(gpu, "_features", lambda outs, rows: features)
        gpu._linear.cache_clear()

    yield choose
    gpu._linear.cache_clear()


@needs_shim
@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear_is_the_product_with_the_decoded_matrix(case):
    problem = Problem(*case)
    forward, reverse = problem.run(), problem.run(order="reverse")
    assert forward.dtype == mx.float32
    assert same_bits(bits_of(forward), bits_of(reverse))
    atol = DTYPES[mx.float32] * np.abs(problem.expected).max()
    np.testing.assert_allclose(exact(forward), problem.expected, rtol=0, atol=atol)


@needs_shim
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 3, 8, 0])
def test_short_floats(bits, dtype):
    problem = Problem(bits, 64, 3, 704, 5, True, True, dtype)
    out = problem.run()
    assert out.dtype == dtype
    atol = DTYPES[dtype] * np.abs(problem.expected).max()
    np.testing.assert_allclose(exact(out), problem.expected, rtol=0, atol=atol)


@needs_shim
def test_the_reference_agrees():
    for bits in (4, 0):
        problem = Problem(bits, 64, 7, 1088, 5, True, True)
        expected = reference.linear(problem.x, problem.weight, problem.norm, problem.residual)
        np.testing.assert_allclose(exact(problem.run()), exact(expected), rtol=0, atol=5e-5)


@needs_shim
@pytest.mark.parametrize("sanitize", ["memory", "races"])
@pytest.mark.parametrize("case", [CASES[4], CASES[2], CASES[11]], ids=str)
def test_no_access_out_of_bounds_and_no_race(case, sanitize, side_by_side):
    """Of 5 features, by 4."""
    problem = Problem(*case)
    expected = bits_of(problem.run())
    side_by_side(4)
    assert same_bits(bits_of(problem.run(sanitize=sanitize)), expected)


@needs_shim
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_has_the_same_bits_in_any_company(case):
    """Alone, among others, in another order: variants for 1, 2, 4 .. rows give the same bits.

    In float32, for another order of addition seldom shows after rounding to 16 bits.
    """
    bits, group, _, size, out, norm, residual = case
    problem = Problem(bits, group, 20, size, out, norm, residual)
    together = bits_of(problem.run())
    rng = np.random.default_rng(1)
    for count in (1, 2, 3, 7, 11) if case in (CASES[4], CASES[-1]) else (1, 7):
        rows = rng.permutation(20)[:count]
        assert same_bits(bits_of(problem.run(mx.array(rows))), together[rows])


@needs_shim
@pytest.mark.parametrize("bits", [0, 4])
def test_features_computed_side_by_side_have_the_same_bits(bits, side_by_side):
    problem = Problem(bits, 32, 13, 320, 13, True, False)
    expected = bits_of(problem.run())
    for features in (2, 4):
        side_by_side(features)
        assert same_bits(bits_of(problem.run()), expected)


def test_long_rows_of_small_matrices_are_shared():
    shapes = [(1024, 8), (2047, 8), (2048, 257), (4096, 2048), (2048, 12352), (2048, 248320)]
    assert [gpu._split(*shape) for shape in shapes] == [1, 1, 2, 4, 2, 1]
    assert gpu._split(10**6, 8) == 8


def test_small_matrices_have_fewer_features_in_a_simdgroup():
    assert [gpu._features(outs, 1) for outs in (1, 8191, 8192, 16383, 16384, 10**6)] == [
        1,
        1,
        2,
        2,
        4,
        4,
    ]
    assert gpu._features(10**6, 32) == 2


@needs_shim
@pytest.mark.parametrize("packing", [(2, 32), (3, 64), (4, 64), (5, 32), (6, 128), (8, 32), None])
def test_embed_decodes_rows(packing):
    weight, matrix = some_weight(np.random.default_rng(2), 50, 384, packing=packing)
    ids = np.array([49, 0, 7, 7, 31], np.int32)
    with through_shim(sanitize="memory"):
        x = gpu.embed(ids, weight)
    assert x.dtype == mx.float32
    np.testing.assert_allclose(exact(x), matrix[ids], rtol=3e-6, atol=1e-7)


@needs_shim
@pytest.mark.parametrize("bits", [0, 2, 3, 4, 5, 6, 8])
def test_embed_rounds_once_to_bfloat16(bits):
    """Scales of 16 bits: scale * code + bias is exact before it is rounded to float."""
    rng = np.random.default_rng(3)
    made = some_weight(rng, 40, 256, packing=(bits, 32) if bits else None)[0]
    weight, matrix = as_dtype(made, mx.bfloat16)
    ids = rng.integers(0, 40, 9).astype(np.int32)
    with through_shim():
        x = gpu.embed(ids, weight)
    expected = mx.array(matrix[ids].astype(np.float32)).astype(mx.bfloat16)
    assert same_bits(bits_of(x), bits_of(expected))


def test_what_the_kernels_do_not_take():
    rng = np.random.default_rng(4)
    x = mx.array(normal(rng, 33, 64))
    four, _ = packed(rng, 8, 64, bits=4, group_size=64)
    odd, _ = dense(rng, 8, 12)
    stack, _ = dense(rng, 2, 8, 64)
    short = Norm(mx.ones(64, dtype=mx.float16), 1e-6)
    tiny, _ = packed(rng, 1, 32, bits=2, group_size=32)
    sixteen = Weight(four.data, four.scales[:, :1], four.biases[:, :1], 4, 16)
    refused: dict[str, tuple] = {
        "33 rows, expected 1 to 32": (x, four),
        "12 inputs, expected a multiple of 8": (x[:1, :12], odd),
        "weight of 3 dimensions, expected 2": (x[:1], stack),
        "norm of mlx.core.float16, expected mlx.core.float32 as x": (x[:1], four, short),
        "weight of mlx.core.float32, expected mlx.core.bfloat16 as x": (
            x[:1].astype(mx.bfloat16),
            four,
        ),
        "a weight of 2 words, expected 8": (x[:1, :32], tiny),
        "4 bits in groups of 16": (x[:1], sixteen),
    }
    for words, arguments in refused.items():
        with pytest.raises(Unsupported, match=rf"kernel linear: .*{words}"):
            gpu.linear(*arguments)
    with pytest.raises(Unsupported, match=r"kernel embed: .*12 inputs"):
        gpu.embed(np.zeros(1, np.int32), odd)


@pytest.mark.parametrize("kernel", [gpu.LINEAR, gpu.EMBED], ids=lambda k: k.name)
def test_the_texts_keep_the_rules(kernel):
    assert not broken_rules(kernel)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize(("bits", "rows"), [(4, 1), (4, 8), (3, 8), (0, 8)])
def test_the_text_compiles_for_cuda_without_spills(bits, rows, tmp_path):
    dtype = mx.bfloat16
    template: Template = {
        "T": dtype,
        "BITS": bits,
        "GROUP": 64,
        "ROWS": rows,
        "OUTS": 4,
        "SPLIT": 2,
        "SIMDGROUPS": 2,
        "NORM": rows == 1,
        "RESIDUAL": rows > 1,
    }
    arrays = [dtype, mx.uint32 if bits else dtype, dtype, dtype, dtype, mx.float32, dtype]
    source, target = tmp_path / "linear.cu", tmp_path / "linear.cubin"
    source.write_text(cuda_source(gpu.LINEAR, arrays, [dtype], template))
    flags = ["-arch=sm_90", "-std=c++17", "-cubin", "-Werror=all-warnings", "-Xptxas=-v"]
    command = ["nvcc", *flags, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in done.stderr, done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_embedding_compiles_for_cuda(tmp_path):
    template: Template = {"T": mx.bfloat16, "BITS": 6, "GROUP": 64}
    arrays = [mx.int32, mx.uint32, mx.bfloat16, mx.bfloat16]
    source, target = tmp_path / "embed.cu", tmp_path / "embed.cubin"
    source.write_text(cuda_source(gpu.EMBED, arrays, [mx.bfloat16], template))
    flags = ["-arch=sm_90", "-std=c++17", "-cubin", "-Werror=all-warnings"]
    command = ["nvcc", *flags, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
