"""Attention as GPU kernels, on the CPU shim: against float64, and each row like plain decoding."""

import shutil
import subprocess
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest

from specdec.kernels.attention import AttentionLayout
from specdec.kernels.gpu import attention as gpu
from specdec.kernels.gpu.limits import Unsupported
from specdec.kernels.layout import TreeLayout
from specdec.kernels.linear import Piece
from tests.kernels.gpu.arrays import exact, random
from tests.metal.build import compiler
from tests.metal.cuda import cuda_source
from tests.metal.rules import broken_rules
from tests.metal.run import through_shim

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")
NVCC = shutil.which("nvcc")

CLOSE = {mx.float32: 2e-6, mx.float16: 2e-3, mx.bfloat16: 1.5e-2}  # for results of about 1
LENGTHS = (0, 1, 63, 64, 127, 128, 255, 256, 257, 1000)
TREE = TreeLayout(np.array([-1, 0, 0, 1, 1, 2, 5], np.int32))
ROOT = TreeLayout.chain(1)


@contextmanager
def with_choices(together=None, more_blocks=0):
    """Another number of heads for each threadgroup, or more blocks than are needed."""
    with pytest.MonkeyPatch.context() as patch:
        if together is not None:
            patch.setattr(gpu, "heads_together", lambda group, others: together)
        if more_blocks:
            rounded = gpu.rounded
            patch.setattr(gpu, "rounded", lambda blocks: rounded(blocks) + more_blocks)
        gpu._attention.cache_clear()
        yield
    gpu._attention.cache_clear()


# ---- attention


class Case:
    """Queries, keys, values and gates of a tree after `length` committed tokens."""

    def __init__(self, tree, length, heads, kv_heads, dim, dtype=mx.float32, gated=False, seed=0):
        rows, self.scale = tree.rows, dim**-0.5
        self.layout = AttentionLayout(tree, length)
        self.queries = random((heads, rows, dim), seed, dtype) * 2
        capacity = length + rows + 9
        keys, values = (
            np.array(random((kv_heads, capacity, dim), seed + i).astype(mx.float32)) for i in (1, 2)
        )
        # what stands behind the rows' own keys is nobody's
        keys[:, length + rows :] = values[:, length + rows :] = np.nan
        self.keys, self.values = mx.array(keys).astype(dtype), mx.array(values).astype(dtype)
        rows_of_gates = random((rows, 6 + 2 * heads * dim), seed + 3, dtype)
        self.gate = Piece(rows_of_gates, 6, 2 * heads * dim) if gated else None

    def run(self, **shim):
        with through_shim(**shim):
            return gpu.tree_attention(
                self.queries, self.keys, self.values, self.layout, self.scale, self.gate
            )

    def places(self, row):
        length, paths = self.layout.length, self.layout.tree.paths
        return [*range(length), *(length + int(p) for p in paths[row] if p >= 0)]

    def expected(self):
        """In float64: [rows, heads * dim]."""
        queries, keys, values = exact(self.queries), exact(self.keys), exact(self.values)
        heads, rows, dim = queries.shape
        group = heads // keys.shape[0]
        out = np.zeros((rows, heads, dim))
        for row in range(rows):
            at = self.places(row)
            for head in range(heads):
                scores = keys[head // group][at] @ queries[head, row] * self.scale
                weights = np.exp(scores - scores.max())
                out[row, head] = weights @ values[head // group][at] / weights.sum()
        if self.gate is not None:
            gates = exact(self.gate.values).reshape(rows, heads, 2, dim)[:, :, 1]
            out = out / (1 + np.exp(-gates))
        return out.reshape(rows, -1)

    def row_alone(self, row):
        """The row as plain decoding would compute it: its path committed, and nobody else."""
        alone, places = object.__new__(Case), mx.array(self.places(row))
        alone.scale, alone.layout = self.scale, AttentionLayout(ROOT, len(places) - 1)
        alone.queries = mx.contiguous(self.queries[:, row : row + 1])
        alone.keys, alone.values = (mx.contiguous(c[:, places]) for c in (self.keys, self.values))
        alone.gate = self.gate and Piece(
            mx.contiguous(self.gate.rows[row : row + 1]), self.gate.start, self.gate.width
        )
        return alone


@pytest.mark.parametrize("length", LENGTHS)
def test_attention_at_every_length(length):
    case = Case(TREE, length, 4, 2, 64, gated=True)
    found = case.run()
    assert found.shape == (7, 256)
    np.testing.assert_allclose(exact(found), case.expected(), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "gated"),
    [
        (16, 1, 32, False),
        (3, 1, 96, True),
        (5, 5, 128, False),
        (8, 1, 256, True),
        (7, 1, 160, False),
    ],
)
def test_attention_of_every_shape(heads, kv_heads, dim, gated, dtype):
    case = Case(TREE, 150, heads, kv_heads, dim, dtype, gated)
    found = case.run(order="reverse")
    assert found.dtype == dtype
    np.testing.assert_allclose(exact(found), case.expected(), rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("sanitize", ["memory", "races"])
def test_attention_under_sanitizers(sanitize):
    case = Case(TREE, 125, 4, 2, 64, mx.bfloat16, gated=True)
    np.testing.assert_array_equal(exact(case.run(sanitize=sanitize)), exact(case.run()))


@pytest.mark.parametrize("length", [0, 61, 124, 126, 254, 300])
def test_a_row_of_a_tree_is_the_row_of_plain_decoding(length):
    """Across the borders of runs and of blocks, bit for bit."""
    case = Case(TREE, length, 4, 2, 64, gated=True)
    together = exact(case.run())
    for row in range(7):
        np.testing.assert_array_equal(together[[row]], exact(case.row_alone(row).run()))


def test_a_long_chain_is_plain_decoding():
    case = Case(TreeLayout.chain(32), 110, 2, 1, 32, mx.bfloat16)
    together = exact(case.run())
    for row in (0, 1, 17, 18, 19, 31):
        np.testing.assert_array_equal(together[[row]], exact(case.row_alone(row).run()))


@pytest.mark.parametrize("together", [1, 2, 4, 8])
def test_how_the_work_is_cut_changes_no_bit(together):
    case = Case(TREE, 250, 8, 1, 64, gated=True)
    with with_choices(together=1 if together > 1 else 8):
        expected = exact(case.run())
    with with_choices(together=together, more_blocks=together):
        np.testing.assert_array_equal(exact(case.run(order="reverse")), expected)


def test_a_row_with_nan_spoils_no_other():
    case = Case(TREE, 40, 2, 1, 64)
    clean = exact(case.run())
    values = np.array(case.values)
    values[:, 40 + 2] = np.nan  # row 2 and what descends from it: rows 5 and 6
    case.values = mx.array(values)
    found = exact(case.run())
    assert np.isnan(found[[2, 5, 6]]).all()
    np.testing.assert_array_equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_positions_without_a_key_weigh_exactly_nothing():
    """The row's own key is what stands in for them: here it has no weight and a huge value."""
    case = Case(ROOT, 1, 1, 1, 32)
    case.queries = mx.ones((1, 1, 32))
    keys, values = np.array(case.keys), np.array(case.values)
    keys[0, :2] = [[40.0], [-40.0]]
    values[0, 1] = 1e30
    case.keys, case.values = mx.array(keys), mx.array(values)
    np.testing.assert_array_equal(exact(case.run())[0], values[0, 0])


def test_large_scores_do_not_overflow():
    case = Case(TREE, 200, 2, 1, 64)
    case.queries = case.queries * 300
    np.testing.assert_allclose(exact(case.run()), case.expected(), rtol=2e-3, atol=2e-3)


def test_launches_are_kept():
    for length in (1000, 1001):
        Case(ROOT, length, 2, 1, 32).run()
    before = gpu._attention.cache_info().misses
    Case(ROOT, 1002, 2, 1, 32).run()
    assert gpu._attention.cache_info().misses == before
    counts = {gpu.rounded(n) for n in range(1, 1000)}
    assert len(counts) < 40
    assert all(n <= gpu.rounded(n) <= n * 1.25 for n in range(1, 1000))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "words"),
    [(4, 2, 288, "head dim 288"), (4, 2, 80, "head dim 80"), (17, 1, 64, "17 heads")],
)
def test_what_is_not_supported(heads, kv_heads, dim, words):
    case = Case(ROOT, 3, heads, kv_heads, dim)
    with pytest.raises(Unsupported, match=words):
        case.run()


def test_types_are_not_mixed():
    case = Case(ROOT, 3, 2, 1, 64)
    case.keys = case.keys.astype(mx.bfloat16)
    with pytest.raises(Unsupported, match="bfloat16"):
        case.run()


# ---- the text


@pytest.mark.parametrize("kernel", [gpu.BLOCKS, gpu.MERGE], ids=lambda k: k.name)
def test_rules(kernel):
    assert broken_rules(kernel) == []


def sources():
    b, h, f, i = mx.bfloat16, mx.float16, mx.float32, mx.int32
    for t, dim, g in ((b, 256, 8), (h, 96, 3)):
        yield cuda_source(
            gpu.BLOCKS, [t, t, t, f, i], [f, f], {"T": t, "DIM": dim, "G": g, "WINDOW": g > 1}
        )
    yield cuda_source(
        gpu.MERGE, [f, f, i, b, i], [b], {"T": b, "DIM": 256, "GATED": True, "WINDOW": True}
    )


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_kernels_compile_for_cuda_without_spilling(tmp_path):
    for source in sources():
        (tmp_path / "kernel.cu").write_text(source)
        flags = ["-arch=sm_90", "-std=c++17", "-cubin", "-Werror=all-warnings", "-Xptxas", "-v"]
        done = subprocess.run(
            [str(NVCC), *flags, "kernel.cu", "-o", "kernel.cubin"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert " 0 bytes spill stores" in done.stderr
