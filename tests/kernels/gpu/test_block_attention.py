"""The kernels of a draft's block against their reference, for any number of told rows."""

import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from specdec.kernels import block_attention as reference
from specdec.kernels.attention_inputs import AttentionShape
from specdec.kernels.gpu import attention
from specdec.kernels.gpu import block_attention as gpu
from specdec.kernels.gpu.in_place import write_in_place
from specdec.kernels.gpu.limits import Unsupported
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm
from tests.metal.build import compiler
from tests.metal.cuda import cuda_source
from tests.metal.rules import broken_rules
from tests.metal.run import through_shim

NVCC = shutil.which("nvcc")
needs_shim = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")
by_reference = {
    name: getattr(reference, name).reference for name in ("block_inputs", "seen_attention")
}


def normal(*shape, dtype=mx.float32):
    rng = np.random.default_rng(sum(shape))
    return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)


def numbers(x) -> np.ndarray:
    return np.array(x.astype(mx.float32))


@needs_shim
@pytest.mark.parametrize(
    ("block", "heads", "kv_heads", "dim", "half", "dtype", "options"),
    [
        (5, 4, 2, 64, 16, mx.float32, {"sanitize": "memory"}),
        (3, 2, 2, 32, 16, mx.float32, {"sanitize": "races"}),
        (8, 6, 1, 96, 48, mx.bfloat16, {"order": "reverse"}),
    ],
)
def test_inputs(block, heads, kv_heads, dim, half, dtype, options):
    norms = Norm(normal(dim, dtype=dtype), 1e-6), Norm(1 + normal(dim, dtype=dtype), 1e-5)
    shape = AttentionShape(heads, kv_heads, dim, False, *norms)
    rows = normal(block, 3 + (heads + 2 * kv_heads) * dim, dtype=dtype)
    starts = np.cumsum([3, heads * dim, kv_heads * dim]).tolist()
    widths = [heads * dim, kv_heads * dim, kv_heads * dim]
    q, k, v = (Piece(rows, *place) for place in zip(starts, widths, strict=True))
    told_rows = normal(block, 2 * kv_heads * dim, dtype=dtype)
    width = kv_heads * dim
    told = Piece(told_rows, 0, width), Piece(told_rows, width, width)
    cos, sin = normal(2 * block + 1, half), normal(2 * block + 2, half)[1:]
    for count in range(block + 1):
        kept = normal(2, kv_heads, 2 * block + 9, dim, dtype=dtype)
        buffer = kept, mx.array([4, 99], mx.int32), mx.zeros(8, dtype)
        given = (q, k, v), told, mx.array([count, 99], mx.int32), shape, cos, sin, *buffer
        theirs = by_reference["block_inputs"](*given)
        with through_shim(**options):
            with write_in_place(False):
                ours = gpu.block_inputs(*given)
            with write_in_place():
                in_place = gpu.block_inputs(*given)
        assert in_place[1] is kept
        assert (ours[2], theirs[2]) == (None, None)
        error = 1e-5 if dtype == mx.float32 else 0.13
        for i in range(2):
            np.testing.assert_allclose(numbers(ours[i]), numbers(theirs[i]), atol=error)
            assert (numbers(in_place[i])[..., :4, :] == numbers(ours[i])[..., :4, :]).all()
        # what lies behind the block is never looked at
        end = 4 + count + block
        assert (numbers(kept)[:, :, :end] == numbers(ours[1])[:, :, :end]).all()
        assert not numbers(ours[1])[:, :, end : 4 + 2 * block].any()


@needs_shim
@pytest.mark.parametrize("options", [{"sanitize": "memory"}, {"order": "reverse"}])
def test_attention_over_runs_of_places(options):
    """Runs that begin and end within blocks of positions and at their edges."""
    first = [0, 1, 127, 128, 200, 255, 300, 383]
    last = [0, 383, 127, 128, 383, 256, 300, 383]
    seen = np.array([[b, b + 1, a, 0] for a, b in zip(first, last, strict=True)], np.int32)
    queries, rows = normal(4, 8, 64), normal(2, 2, 512, 64)
    given = queries, rows, mx.array(seen), 384, 0.125
    with through_shim(**options):
        found = gpu.seen_attention(*given)
    expected = by_reference["seen_attention"](*given)
    np.testing.assert_allclose(numbers(found), numbers(expected), atol=2e-5)


def test_what_is_not_taken():
    piece = Piece(normal(3, 48), 0, 48)
    norm = Norm(normal(48), 1e-6)
    shape = AttentionShape(1, 1, 48, False, norm, norm)
    given = (piece, piece, piece), (piece, piece), mx.array([1]), shape, normal(6, 8)
    with pytest.raises(Unsupported, match="head dim 48"):
        gpu.block_inputs(*given, normal(6, 8), normal(2, 1, 9, 48), mx.array([0]), normal(8))


def test_rules():
    assert broken_rules(gpu.BLOCK_INPUTS) == []


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_cuda_compiles(tmp_path):
    b, f, i = mx.bfloat16, mx.float32, mx.int32
    inputs = [b, b, b, b, b, i, i, b, b, f, f, f, f, b, i, b]
    source = tmp_path / "kernel.cu"
    words = cuda_source(gpu.BLOCK_INPUTS, inputs, [b, b], {"T": b, "DIM": 64, "STAGED": True})
    source.write_text(words)
    flags = ["-arch=sm_90", "-std=c++17", "-cubin", "-Werror=all-warnings"]
    command = [str(NVCC), *flags, str(source), "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert attention.BLOCKS.helpers
