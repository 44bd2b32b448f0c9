"""The routing kernel against a sort and a softmax in float64; the union; rows in any company."""

import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from specdec.kernels.gpu.limits import Unsupported
from specdec.kernels.gpu.routing import ROUTE, route
from specdec.kernels.linear import Piece
from tests.metal.build import compiler
from tests.metal.cuda import cuda_source
from tests.metal.rules import broken_rules
from tests.metal.run import through_shim

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")


def routed(logits, top_k, normalize, start=0, width=None, dtype=mx.float32, **options):
    """experts, weights, union as NumPy arrays."""
    piece = Piece(mx.array(logits).astype(dtype), start, width or logits.shape[1])
    with through_shim(**options):
        routing = route(piece, top_k, normalize)
    return tuple(np.array(a) for a in (routing.experts, routing.weights, routing.union))


def route64(logits, top_k, normalize):
    experts = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(1, keepdims=True))
    chosen = np.take_along_axis(powers, experts, axis=1)
    return experts, chosen / (chosen if normalize else powers).sum(1, keepdims=True)


def union_of(experts, count):
    rows, top_k = experts.shape
    masks = {e: sum(1 << r for r in range(rows) if e in experts[r]) for e in np.unique(experts)}
    entries = [[e, mask - (mask >> 31 << 32)] for e, mask in sorted(masks.items())]
    return entries + [[-1, 0]] * (min(rows * top_k, count) - len(entries))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("rows", "experts", "top_k", "start", "columns", "options"),
    [
        (1, 1, 1, 0, 1, {"sanitize": "memory"}),
        (7, 7, 7, 0, 7, {"order": "reverse"}),
        (9, 37, 4, 3, 41, {"sanitize": "memory"}),
        (32, 16, 4, 0, 17, {"sanitize": "races"}),
        (7, 256, 8, 0, 257, {}),
        (32, 512, 16, 1, 513, {"order": "reverse"}),
    ],
)
def test_chosen_experts_weights_and_union(normalize, rows, experts, top_k, start, columns, options):
    logits = np.random.default_rng(experts).normal(0, 3, (rows, columns)).astype(np.float32)
    chosen, weights, union = routed(logits, top_k, normalize, start, experts, **options)
    expected = route64(logits[:, start : start + experts], top_k, normalize)
    assert np.array_equal(chosen, expected[0])
    np.testing.assert_allclose(weights, expected[1], rtol=3e-6)
    assert union.tolist() == union_of(chosen, experts)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_short_logits(dtype):
    logits = np.random.default_rng(1).normal(0, 3, (3, 70)).astype(np.float32)
    logits = np.array(mx.array(logits).astype(dtype).astype(mx.float32))  # many equal ones
    chosen, weights, _ = routed(logits, 6, True, dtype=dtype)
    expected = route64(logits, 6, True)
    assert np.array_equal(chosen, expected[0])
    np.testing.assert_allclose(weights, expected[1], rtol=3e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_equal_large_infinite_and_broken_logits(normalize):
    logits = np.array(
        [
            [1, 3, 3, 3, 1],
            [0, 0, 0, 0, 0],
            [-0.0, 0.0, -1, 0.0, 2],
            [3e4, -np.inf, -np.inf, 3e4 + 1, -np.inf],
            [5, -np.inf, -np.inf, -np.inf, -np.inf],
            [1, 2, 3, np.nan, 4],
            [np.inf, 2, np.nan, 1, -np.nan],
        ],
        np.float32,
    )
    chosen, weights, _ = routed(logits, 3, normalize)
    assert chosen.tolist() == [
        [1, 2, 3],
        [0, 1, 2],
        [4, 0, 1],
        [3, 0, 1],
        [0, 1, 2],
        [3, 4, 2],
        [2, 4, 0],
    ]
    np.testing.assert_allclose(weights[:5], route64(logits[:5], 3, normalize)[1], rtol=3e-6)
    assert np.isnan(weights[5:]).all()


def test_a_row_has_the_same_bits_in_any_company():
    rng = np.random.default_rng(2)
    logits = rng.integers(-6, 6, (11, 81)).astype(np.float32) / 4  # many equal ones
    for normalize in (True, False):
        chosen, weights, _ = routed(logits, 5, normalize, 1, 80)
        assert np.array_equal(chosen, route64(logits[:, 1:], 5, normalize)[0])
        order = rng.permutation(11)[:7]
        other = routed(logits[order], 5, normalize, 1, 80)
        assert np.array_equal(other[0], chosen[order])
        assert np.array_equal(other[1], weights[order])
        for row in range(11):
            alone = routed(logits[row : row + 1], 5, normalize, 1, 80)
            assert np.array_equal(alone[0][0], chosen[row])
            assert np.array_equal(alone[1][0], weights[row])


@pytest.mark.parametrize(
    ("rows", "experts", "top_k", "words"),
    [
        (33, 8, 2, "33 rows, expected 1 to 32"),
        (1, 513, 2, "513 experts, expected 1 to 512"),
        (1, 64, 17, "top 17 of 64, expected 1 to 16"),
    ],
)
def test_what_the_kernel_does_not_take(rows, experts, top_k, words):
    with pytest.raises(Unsupported, match=f"kernel route: {words}"):
        routed(np.zeros((rows, experts), np.float32), top_k, True)


def test_the_kernel_keeps_the_rules():
    assert broken_rules(ROUTE) == []


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_the_kernel_compiles_for_cuda(tmp_path):
    template: dict[str, int | bool | mx.Dtype] = {
        "T": mx.bfloat16,
        "EXPERTS": 256,
        "TOP_K": 8,
        "START": 0,
        "NORMALIZE": True,
    }
    source = tmp_path / "kernel.cu"
    source.write_text(cuda_source(ROUTE, [mx.bfloat16], [mx.int32, mx.float32, mx.int32], template))
    flags = ["-arch=sm_90", "-std=c++17", "-cubin", "-Werror=all-warnings"]
    done = subprocess.run(
        [str(NVCC), *flags, str(source), "-o", str(tmp_path / "kernel.cubin")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
