"""Normed rows: what they hold, whoever makes them, and that experts read those of the routing."""

import shutil
import subprocess
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from specdec.kernels.gpu import normed
from specdec.kernels.gpu.expert_launches import launches
from specdec.kernels.gpu.experts import feed_forward
from specdec.kernels.gpu.kernel import Launch
from specdec.kernels.gpu.normed import MAX_INPUTS, is_normed, normed_rows, normed_shape
from specdec.kernels.gpu.routing import ROUTE_NORMED, route
from specdec.kernels.gpu.tiles import use_tiles
from specdec.kernels.linear import Piece
from specdec.kernels.norm import Norm
from tests.backends import same_bits
from tests.kernels.gpu.layers import EPS, Layer, exact
from tests.kernels.weights import normal
from tests.metal.build import compiler
from tests.metal.cuda import cuda_source
from tests.metal.rules import broken_rules
from tests.metal.run import through_shim

NVCC = shutil.which("nvcc")
B = mx.bfloat16
pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")


@pytest.fixture(autouse=True)
def on_tiles():
    with use_tiles():
        yield


def rows_of(rows, inputs, seed=0):
    rng = np.random.default_rng(seed)
    norm = Norm(mx.array(1 + 0.1 * normal(rng, inputs)).astype(B), EPS)
    return mx.array(normal(rng, rows, inputs)).astype(B), norm


def made(x, norm, **options):
    with through_shim(**options):
        return np.array(normed_rows(x, norm))


@pytest.mark.parametrize(
    ("rows", "inputs", "options"),
    [
        (1, 32, {"sanitize": "memory"}),
        (3, 96, {"sanitize": "races"}),
        (7, 2048, {"order": "reverse"}),
        (2, 5120, {}),
        (2, 4128, {"sanitize": "memory"}),  # more turns than simdgroups, the last one not whole
        (1, MAX_INPUTS, {}),
    ],
)
def test_what_a_row_holds(rows, inputs, options):
    x, norm = rows_of(rows, inputs)
    words = made(x, norm, **options)
    assert words.dtype == np.uint32
    assert words.shape == normed_shape(rows, inputs)
    assert words.shape[1] % 4 == 0
    pairs, sums = words[:, : inputs // 2], words[:, inputs // 2 :].view(np.float32)
    products = x * norm.weight  # rounded to bfloat16 once
    assert np.array_equal(pairs, np.array(products.view(mx.uint32)))
    blocks = exact(products).astype(np.float64).reshape(rows, -1, 32)
    size = np.abs(blocks).sum(-1)
    assert (np.abs(sums[:, : inputs // 32] - blocks.sum(-1)) <= 32 * 2.0**-24 * size).all()
    squares = (exact(x).astype(np.float64) ** 2).mean(-1)
    np.testing.assert_allclose(sums[:, inputs // 32], 1 / np.sqrt(squares + EPS), rtol=1e-6)


def test_bits_depend_neither_on_company_nor_on_simdgroups(monkeypatch):
    x, norm = rows_of(7, 1056)
    whole = made(x, norm)
    with_padding = normed_shape(1, 1056)[1]
    held = 1056 // 2 + 1056 // 32 + 1  # the rest of a row is not written
    assert held < with_padding
    for count in (1, 3, 16):
        monkeypatch.setattr(normed, "SIMDGROUPS", count)
        normed._launch.cache_clear()
        assert np.array_equal(made(x, norm)[:, :held], whole[:, :held])
        assert np.array_equal(made(x[3:4], norm)[:, :held], whole[3:4, :held])
    normed._launch.cache_clear()


@pytest.mark.parametrize("options", [{"sanitize": "memory"}, {"sanitize": "races"}], ids=str)
@pytest.mark.parametrize(("rows", "experts"), [(1, 8), (9, 40), (20, 256)])
def test_routing_makes_them_beside(rows, experts, options):
    """Whatever threads a threadgroup of the routing has."""
    x, norm = rows_of(rows, 288)
    logits = mx.array(normal(np.random.default_rng(1), rows, experts + 1)).astype(B)
    piece = Piece(logits, 1, experts)
    with through_shim(**options):
        beside = route(piece, 4, True, x, norm)
        alone = route(piece, 4, True)
    assert alone.normed is None
    for name in ("experts", "weights", "union"):
        assert np.array_equal(np.array(getattr(beside, name)), np.array(getattr(alone, name)))
    held = 288 // 2 + 288 // 32 + 1
    assert np.array_equal(np.array(beside.normed)[:, :held], made(x, norm)[:, :held])


def test_experts_read_those_of_the_routing():
    layer = Layer.random(dtype=B)
    x, _, _, gate = layer.inputs(6, 3)
    logits = mx.array(normal(np.random.default_rng(1), 6, 8)).astype(B)
    ran = []
    launches.cache_clear()
    # undone before the shim is: its launches would stay otherwise
    with through_shim(), pytest.MonkeyPatch.context() as patch:
        on_cpu = Launch.__call__

        def call(self, *inputs):
            ran.append(self.kernel.name)
            return on_cpu(self, *inputs)

        def forward(routing):
            shared = Piece(gate, 3, 1)
            return exact(
                feed_forward(x, layer.norm, layer.bank, routing, layer.table, layer.shared, shared)
            )

        patch.setattr(Launch, "__call__", call)
        routing = route(Piece(logits, 0, 8), 3, True, x, layer.norm)
        y = forward(routing)
        assert ran == ["route_normed", "expert_hidden_tiles", "expert_sum_tiles"]
        assert same_bits(y, forward(replace(routing, normed=None)))
        assert ran[3:] == ["normed_rows", "expert_hidden_tiles", "expert_sum_tiles"]
    launches.cache_clear()


def test_where_there_are_none():
    x, norm = rows_of(2, 64)
    assert is_normed(x, norm)
    wide, wide_norm = x.astype(mx.float32), Norm(norm.weight.astype(mx.float32), EPS)
    assert not is_normed(wide, wide_norm)
    assert not is_normed(x, wide_norm)
    assert not is_normed(*rows_of(2, 72))
    assert not is_normed(*rows_of(1, MAX_INPUTS + 32))
    with use_tiles(False):
        assert not is_normed(x, norm)
    with through_shim():
        routing = route(Piece(wide, 0, 64), 4, True, wide, wide_norm)
    assert routing.normed is None


@pytest.mark.parametrize("kernel", [normed.NORMED_ROWS, ROUTE_NORMED], ids=str)
def test_kernels_keep_the_rules(kernel):
    assert broken_rules(kernel) == []


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("kernel", [normed.NORMED_ROWS, ROUTE_NORMED], ids=str)
def test_kernels_compile_for_cuda(kernel, tmp_path):
    f, i, u = mx.float32, mx.int32, mx.uint32
    template: dict[str, int | bool | mx.Dtype] = {"T": B}
    inputs, outputs = [B, B, f], [u]
    if kernel is ROUTE_NORMED:
        template |= {"EXPERTS": 256, "TOP_K": 8, "START": 0, "NORMALIZE": True}
        inputs, outputs = [B, *inputs], [i, f, i, u]
    source = tmp_path / "kernel.cu"
    source.write_text(cuda_source(kernel, inputs, outputs, template))
    flags = ["-std=c++17", "-cubin", "-Werror=all-warnings", "-o", str(tmp_path / "kernel.cubin")]
    for arch in ("sm_75", "sm_80", "sm_90"):  # the first has no extremes in one instruction
        done = subprocess.run(
            [str(NVCC), f"-arch={arch}", *flags, str(source)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
