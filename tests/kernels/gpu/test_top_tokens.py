"""The kernels of the most probable tokens against a full sort and sums in float64."""

import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from specdec.kernels import top_tokens as reference
from specdec.kernels.gpu import top_tokens as gpu
from specdec.kernels.gpu.limits import Unsupported
from tests.kernels.gpu.arrays import exact
from tests.metal.build import compiler
from tests.metal.cuda import cuda_source
from tests.metal.rules import broken_rules
from tests.metal.run import through_shim

NVCC = shutil.which("nvcc")
needs_shim = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")


def some_logits(rows, vocab, dtype, levels=10**6):
    rng = np.random.default_rng(vocab + rows)
    logits = (rng.normal(0, 3, (rows, vocab)) * levels).round() / levels
    return mx.array(logits.astype(np.float32)).astype(dtype)


def check(found: mx.array, logits: mx.array, width: int) -> None:
    host, wide = np.array(found), exact(logits)
    ids, bits = host[:, :width], host[:, width : 2 * width]
    expected = np.argsort(-wide, axis=1, kind="stable")[:, :width]
    assert np.array_equal(ids, expected)
    assert np.array_equal(bits.view(np.float32), np.take_along_axis(wide, expected, 1))
    peak, total = (np.ascontiguousarray(host[:, i]).view(np.float32) for i in (-3, -2))
    assert np.array_equal(peak, wide.max(axis=1))
    np.testing.assert_allclose(total, np.exp(wide - wide.max(1, keepdims=True)).sum(1), rtol=2e-4)
    assert host[:, -1].all()


CASES = [
    (1, 1, 1, {"sanitize": "memory"}),
    (3, 33, 33, {"order": "reverse"}),
    (2, 300, 7, {"sanitize": "races"}),
    (7, 8192, 6, {}),
    (2, 8193, 6, {"sanitize": "memory"}),
    (2, 30000, 40, {"order": "reverse"}),
]


@needs_shim
@pytest.mark.parametrize(("rows", "vocab", "width", "options"), CASES)
def test_best_tokens_and_sums(rows, vocab, width, options):
    for levels, dtype in ((10**6, mx.float32), (1, mx.bfloat16)):
        logits = some_logits(rows, vocab, dtype, levels)
        with through_shim(**options):
            check(gpu.top_tokens(logits, width), logits, width)
        by_reference = reference.top_tokens.reference  # type: ignore[attr-defined]
        check(by_reference(logits, width), logits, width)


@needs_shim
@pytest.mark.parametrize(("rows", "vocab", "width", "options"), CASES)
def test_verdicts(rows, vocab, width, options):
    logits = exact(some_logits(rows, vocab, mx.float16, 1)).astype(np.float32)
    bad = [np.nan, np.inf, -np.inf]
    for row in range(1, rows):
        logits[row, (vocab - 1) * (row % 2)] = bad[row % 3]
    with through_shim(**options):
        found = np.array(gpu.verdict(mx.array(logits)))
    assert found[:, 1].tolist() == [1] + [0] * (rows - 1)
    sound = ~np.isnan(logits).any(axis=1)
    assert np.array_equal(found[sound, 0], logits[sound].argmax(axis=1))
    by_reference = reference.verdict.reference  # type: ignore[attr-defined]
    expected = np.array(by_reference(mx.array(logits)))
    assert np.array_equal(found[sound], expected[sound])


@needs_shim
def test_masked_and_broken_rows():
    logits = np.full((5, 9000), -np.inf, np.float32)
    logits[0, [8999, 5]] = 1.0
    logits[4, [7, 5, 6]] = 2.0  # nothing in the second part
    logits[1, 7] = np.nan
    logits[2, 8998] = np.inf
    with through_shim(order="reverse"):
        found = np.array(gpu.top_tokens(mx.array(logits), 3))
    assert found[0, :3].tolist() == [5, 8999, 0]
    peak, total = (np.ascontiguousarray(found[:, i]).view(np.float32) for i in (-3, -2))
    with np.errstate(all="ignore"):
        sums = peak + np.log(total)
    assert sums[0] == 1.0 + np.float32(np.log(2.0))
    assert sums[4] == 2.0 + np.float32(np.log(3.0))
    assert not np.isfinite(sums[1:4]).any()
    assert not found[:, -1].any()


def test_texts_keep_the_rules():
    assert [rule for kernel in (gpu.TOP, gpu.MERGE) for rule in broken_rules(kernel)] == []


def test_what_is_not_taken():
    with pytest.raises(Unsupported, match="width 65"):
        gpu.top_tokens(mx.zeros((1, 100)), 65)
    with pytest.raises(Unsupported, match="40 rows"):
        gpu.verdict(mx.zeros((40, 100)))
    with pytest.raises(Unsupported, match="int32"):
        gpu.verdict(mx.zeros((4, 100), mx.int32))


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("vocab", [8192, 248320])
def test_cuda_compiles(vocab, tmp_path):
    for width, verdict in ((6, False), (1, True)):
        for launch in filter(None, gpu._launches((7, vocab), mx.bfloat16, width, verdict)):
            dtype = mx.bfloat16 if launch.kernel is gpu.TOP else mx.int32
            source = tmp_path / "kernel.cu"
            source.write_text(
                cuda_source(launch.kernel, [dtype], [mx.int32], dict(launch.template))
            )
            flags = ["-arch=sm_90", "-std=c++17", "-cubin", "-Werror=all-warnings"]
            done = subprocess.run(
                [str(NVCC), *flags, str(source), "-o", str(tmp_path / "kernel.cubin")],
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stdout + done.stderr
