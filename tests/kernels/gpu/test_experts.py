"""The experts' kernels against float64 products; rows in any company; streaming in waves."""

import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from specdec.kernels.experts import ExpertWeights
from specdec.kernels.gpu import expert_launches as gpu
from specdec.kernels.gpu.experts import (
    combine,
    experts_apart,
    feed_forward,
    shared_hidden,
)
from specdec.kernels.gpu.kernel import Launch
from specdec.kernels.gpu.limits import Unsupported
from specdec.kernels.linear import Piece
from specdec.kernels.routing import Routing
from tests.kernels.gpu.layers import Q4, Layer, exact
from tests.metal.build import compiler
from tests.metal.cuda import cuda_source
from tests.metal.rules import broken_rules

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")


@pytest.mark.parametrize(
    ("rows", "top_k", "layer", "options"),
    [
        (1, 4, {}, {}),
        (1, 1, {"shared": "none", "experts": 1}, {"sanitize": "memory"}),
        (2, 3, {"packing": (3, 32), "shared": (4, 64)}, {"order": "reverse"}),
        (
            3,
            2,
            {"packing": None, "shared": None, "hidden": 72, "inner": 40},
            {"sanitize": "memory"},
        ),
        (7, 4, {}, {"sanitize": "races"}),
        (7, 4, {"hidden": 256, "packing": (5, 32), "down": (6, 64)}, {"order": "reverse"}),
        (21, 8, {"shared": "none", "packing": (8, 32), "down": None}, {}),
        (32, 3, {"packing": (2, 128), "inner": 128, "shared_inner": 72, "shared": None}, {}),
        (32, 12, {"packing": None, "shared": None, "hidden": 16, "inner": 8, "experts": 300}, {}),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value),
)
def test_feed_forward(rows, top_k, layer, options):
    made = Layer.random(**layer)
    inputs = made.inputs(rows, top_k)
    y = made.forward(*inputs, **options)
    assert y.dtype == mx.float32
    np.testing.assert_allclose(exact(y), made.forward64(*inputs)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("packing", [Q4, None], ids=str)
def test_short_floats(dtype, packing):
    made = Layer.random(dtype=dtype, packing=packing)
    inputs = made.inputs(5, 4)
    y = made.forward(*inputs)
    assert y.dtype == dtype
    tolerance = {mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    np.testing.assert_allclose(exact(y), made.forward64(*inputs)[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("packing", "dtype"), [(Q4, mx.float32), (None, mx.bfloat16)], ids=str)
def test_a_row_has_the_same_bits_in_any_company(packing, dtype):
    made = Layer.random(packing=packing, shared=(4, 32), dtype=dtype, experts=6)
    x, experts, weights, gate = made.inputs(13, 4)  # some experts have more than 8 rows
    experts[:10] = np.stack([np.random.default_rng(r).permutation([0, 1, 2, 5]) for r in range(10)])
    together = exact(made.forward(x, experts, weights, gate))
    rng = np.random.default_rng(3)
    groups = [rng.permutation(13), rng.permutation(13)[:7], rng.permutation(13)[:3]]
    for rows in (*groups, *np.arange(13)[:, None]):
        index = mx.array(rows)
        y = exact(made.forward(x[index], experts[rows], weights[rows], gate[index]))
        assert np.array_equal(y, together[rows]), rows


@pytest.mark.parametrize(
    ("shared", "dtype", "options"),
    [
        ((8, 64), mx.float32, {"sanitize": "races"}),
        ((8, 64), mx.bfloat16, {"order": "reverse"}),
        ("none", mx.float32, {"sanitize": "memory"}),
    ],
    ids=str,
)
def test_waves_of_streamed_experts_add_up_to_the_whole(shared, dtype, options):
    made = Layer.random(shared=shared, dtype=dtype)
    x, experts, weights, gate = made.inputs(6, 3)
    whole = exact(made.forward(x, experts, weights, gate))
    apart = sum(made.waves(x, experts, weights, **options))
    expected = made.forward64(x, experts, weights, gate)[1]
    np.testing.assert_allclose(np.array(apart), expected, rtol=1e-5, atol=1e-5)
    routing = made.routing(experts, weights)
    for given in (routing, Routing(routing.experts, routing.weights)):  # it needs no union
        y = made.combined(x, apart, given, gate, **options)
        assert y.dtype == dtype
        assert np.array_equal(exact(y), whole)
    if made.shared is None:  # in the order of ranks, each product and sum rounded once
        wide, total = np.array(apart, np.float64), np.zeros(x.shape, np.float32)
        for rank in range(3):
            total = (wide[:, rank] * weights[:, [rank]] + total).astype(np.float32)
        assert np.array_equal(whole, exact(x) + total)


def test_what_the_kernels_do_not_take():
    made = Layer.random()
    x, experts, weights, _ = made.inputs(2, 3)
    routing = made.routing(experts, weights)

    def refuses(words, made=made, x=x, routing=routing):
        with pytest.raises(Unsupported, match=words):
            feed_forward(x, made.norm, made.bank, routing, made.table, None, None)

    refuses("a routing without union", routing=Routing(mx.array(experts), mx.array(weights)))
    refuses("0 rows, expected 1 to 32", x=x[:0])
    refuses("33 rows, expected 1 to 32", x=mx.zeros((33, 128)))
    refuses("norm of .*float32, expected .*float16 as x", x=x.astype(mx.float16))
    refuses("bank: gate of 4 bits in groups of 16", made=Layer.random(packing=(4, 16)))
    refuses(
        "bank: down .128, 37., expected .128, 37., mult", made=Layer.random(packing=None, inner=37)
    )
    bank = ExpertWeights(made.bank.gate, made.shared.up, made.bank.down)
    refuses("bank: up kept as", made=Layer(made.norm, bank, made.table, None, mx.float32))


@pytest.mark.parametrize("kernel", [gpu.EXPERT_HIDDEN, gpu.EXPERT_SUM], ids=lambda k: k.name)
def test_kernels_keep_the_rules(kernel):
    assert broken_rules(kernel) == []


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("rows", [1, 7])
def test_kernels_compile_for_cuda(rows, tmp_path):
    """In the geometry of Qwen3.6-35B-A3B: no spills, and registers for all of a threadgroup."""
    b, f, u, i = mx.bfloat16, mx.float32, mx.uint32, mx.int32
    packed = [((256, 512, 256), 4, 64, b)] * 2 + [((256, 2048, 64), 4, 64, b)]
    alone = [((512, 256), 4, 64, b)] * 2 + [((2048, 64), 4, 64, b)]
    pair = gpu.launches(
        (rows, 2048), b, b, 8, 8 * rows, tuple(packed), tuple(alone), (256, b), None, False, False
    )
    assert pair is not None
    first, second = pair
    assert first is not None
    matrix = [u, b, b]
    sources = [
        (
            first,
            cuda_source(
                gpu.EXPERT_HIDDEN, [b, b, f, *4 * matrix, i, i, i], [f, f], dict(first.template)
            ),
        ),
        (
            second,
            cuda_source(
                gpu.EXPERT_SUM, [b, f, f, *2 * matrix, i, i, i, f, b, f], [b], dict(second.template)
            ),
        ),
    ]
    for launch, text in sources:
        source = tmp_path / "kernel.cu"
        source.write_text(text)
        most = 65536 // launch.threadgroup[0]
        flags = ["-arch=sm_90", "-std=c++17", "-cubin", "-Werror=all-warnings", "-Xptxas", "-v"]
        done = subprocess.run(
            [str(NVCC), *flags, str(source), "-o", str(tmp_path / "kernel.cubin")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        words = (done.stdout + done.stderr).split()
        assert int(words[words.index("registers,") - 1]) <= most
        assert "0 bytes spill stores" in done.stdout + done.stderr


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_the_launches_of_waves_compile_for_cuda(tmp_path, monkeypatch):
    """With the types of the very arrays that stand in the places of what is not used."""
    made = Layer.random(dtype=mx.bfloat16, packing=None, shared=(4, 32))
    x, experts, weights, gate = made.inputs(1, 3)
    routing, sources = made.routing(experts, weights), []

    def record(self, *inputs):
        dtypes = [array.dtype for array in inputs]
        text = cuda_source(self.kernel, dtypes, self.output_dtypes, dict(self.template))
        sources.append(text)
        return [mx.zeros(s, d) for s, d in zip(self.output_shapes, self.output_dtypes, strict=True)]

    monkeypatch.setattr(Launch, "__call__", record)
    apart = experts_apart(x, made.norm, made.bank, routing, made.table)
    hidden = shared_hidden(x, made.norm, made.shared)
    combine(x, apart, routing, made.shared, hidden, Piece(gate, 3, 1))
    assert len(sources) == 4
    for at, text in enumerate(sources):
        source = tmp_path / f"{at}.cu"
        source.write_text(text)
        flags = ["-arch=sm_90", "-std=c++17", "-cubin", "-o", str(tmp_path / "kernel.cubin")]
        done = subprocess.run([str(NVCC), *flags, str(source)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
