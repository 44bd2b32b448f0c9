"""The experts' kernels on matrix units: rounding, rows in any company, streaming, formats."""

import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from specdec.kernels.gpu import expert_tiles as gpu
from specdec.kernels.gpu import normed
from specdec.kernels.gpu.expert_launches import launches
from specdec.kernels.gpu.kernel import Launch
from specdec.kernels.gpu.tiles import use_tiles
from tests.backends import same_bits
from tests.kernels.gpu.layers import Layer, exact
from tests.metal.build import compiler
from tests.metal.cuda import cuda_source
from tests.metal.rules import broken_rules

NVCC = shutil.which("nvcc")
B = mx.bfloat16
pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")


@pytest.fixture(autouse=True)
def on_tiles():
    launches.cache_clear()
    with use_tiles():
        yield
    launches.cache_clear()


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that ran."""
    names = []
    made = Launch.__init__

    def record(self, kernel, *rest):
        names.append(kernel.name)
        made(self, kernel, *rest)

    monkeypatch.setattr(Launch, "__init__", record)
    launches.cache_clear()
    normed._launch.cache_clear()
    return names


def rounded(values):
    return exact(mx.array(values.astype(np.float32)).astype(B)).astype(np.float64)


TILED = {"normed_rows", "expert_hidden_tiles", "expert_sum_tiles"}
EVERY = {"expert_hidden", "expert_sum", *TILED}

# rows, top_k, layer: groups of all sizes, dense, widths that are no whole threadgroup
CASES = [
    (7, 4, {}),
    (1, 3, {"shared": "none", "hidden": 64, "packing": (4, 32), "inner": 32}),
    (3, 2, {"packing": None, "shared": None, "hidden": 96, "inner": 160, "shared_inner": 32}),
    (5, 4, {"packing": (8, 32), "down": (4, 64), "shared": None, "hidden": 192}),
    (20, 3, {"packing": (4, 128), "inner": 128, "experts": 5, "hidden": 256}),
    (32, 14, {"packing": (4, 32), "inner": 32, "experts": 16, "hidden": 64, "shared": "none"}),
    (2, 3, {"packing": (8, 64), "down": (8, 128), "inner": 384, "shared": (4, 32)}),
]


@pytest.mark.parametrize(("rows", "top_k", "layer"), CASES, ids=str)
def test_experts_on_matrix_units(rows, top_k, layer):
    """Rounded to bfloat16 are the normed inputs, what stands between the matrices, and the end."""
    made = Layer.random(dtype=B, **layer)
    inputs = made.inputs(rows, top_k)
    y = exact(made.forward(*inputs))
    assert same_bits(y, exact(made.forward(*inputs, order="reverse")))
    expected = made.forward64(*inputs, rounded)[0]
    # one step of the result, and a few between the matrices that fall to the other side
    step, size = 2.0**-8, np.abs(expected).max()
    np.testing.assert_allclose(y, expected, rtol=step, atol=step / 8 * size)
    assert np.mean(rounded(expected) == y) > 0.9
    exactly = made.forward64(*inputs)[0]
    np.testing.assert_allclose(y, exactly, rtol=0, atol=2 * step * size)


@pytest.mark.parametrize("sanitize", ["memory", "races"])
@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=str)
def test_no_access_out_of_bounds_and_no_race(case, sanitize):
    rows, top_k, layer = case
    made = Layer.random(dtype=B, **layer)
    inputs = made.inputs(rows, top_k)
    assert same_bits(exact(made.forward(*inputs, sanitize=sanitize)), exact(made.forward(*inputs)))


@pytest.mark.parametrize("packing", [(4, 64), (8, 64), None], ids=str)
def test_a_row_has_the_same_bits_in_any_company(packing):
    made = Layer.random(packing=packing, shared=(4, 32), dtype=B, experts=6, hidden=512)
    x, experts, weights, gate = made.inputs(21, 4)  # some experts have more than 16 rows
    experts[:18] = np.stack([np.random.default_rng(r).permutation([0, 1, 2, 5]) for r in range(18)])
    together = exact(made.forward(x, experts, weights, gate))
    rng = np.random.default_rng(3)
    groups = [rng.permutation(21), rng.permutation(21)[:7]]
    for rows in (*groups, *rng.permutation(21)[:4, None]):
        index = mx.array(rows)
        y = exact(made.forward(x[index], experts[rows], weights[rows], gate[index]))
        assert same_bits(y, together[rows]), rows


@pytest.mark.parametrize(
    ("layer", "kernels", "options"),
    [
        ({}, TILED, {"sanitize": "races"}),
        ({"shared": "none"}, EVERY - {"expert_hidden"}, {"order": "reverse"}),
        ({"shared": (3, 64)}, EVERY, {"order": "reverse"}),  # each of the two in its own way
    ],
    ids=["a shared expert", "none", "a shared expert of 3 bits"],
)
def test_waves_of_streamed_experts_add_up_to_the_whole(layer, kernels, options, launched):
    made = Layer.random(dtype=B, **layer)
    x, experts, weights, gate = inputs = made.inputs(6, 3)
    whole = made.forward(*inputs)
    apart = sum(made.waves(x, experts, weights, **options))
    expected = made.forward64(*inputs, rounded)[1]
    np.testing.assert_allclose(np.array(apart), expected, rtol=1e-2, atol=4e-3)
    y = made.combined(x, apart, made.routing(experts, weights), gate, **options)
    assert same_bits(exact(y), exact(whole))
    assert set(launched) == kernels


def names(rows, top_k=8, dtype=B, bits=4, group=64, inner=512, on=True):
    """The kernels of a bank of this format."""
    words = (lambda n: n * bits // 32) if bits else (lambda n: n)
    up = ((256, inner, words(2048)), bits, group if bits else 0, dtype)
    bank = up, up, ((256, 2048, words(inner)), bits, group if bits else 0, dtype)
    with use_tiles(on):
        pair = launches(
            (rows, 2048), dtype, dtype, top_k, rows * top_k, bank, None, None, None, False, on
        )
    assert pair is not None
    return [None if launch is None else launch.kernel.name for launch in pair]


def test_formats_decide_and_rows_do_not():
    tiles, lanes = ([f"expert_{part}{way}" for part in ("hidden", "sum")] for way in ("_tiles", ""))
    for rows in range(1, 33):
        assert names(rows) == names(rows, top_k=14) == names(rows, bits=8) == tiles
        assert names(rows, bits=0) == names(rows, group=128) == tiles
        assert names(rows, top_k=15) == lanes  # more than a threadgroup's memory, in 32 rows
    for other in (
        {"on": False},
        {"bits": 3},
        {"dtype": mx.float32},
        {"dtype": mx.float16},
        {"bits": 0, "inner": 520},
    ):
        assert names(3, **other) == lanes


def test_shares_of_sums_do_not_depend_on_rows_or_on_the_rest():
    def splits(rows, alone):
        up = ((64, 256, 48), 4, 64, B)  # 6 groups
        bank = up, up, ((64, 384, 32), 4, 64, B)
        wide = ((256, 384), 0, 0, B)  # 12 of 32
        shared = None if alone else (wide, wide, ((384, 256), 0, 0, B))
        gate = None if alone else (0, B)
        pair = launches((rows, 384), B, B, 2, 2 * rows, bank, shared, gate, None, False, True)
        assert pair is not None
        assert pair[0] is not None
        found = dict(pair[0].template)
        return found["SPLIT"], 1 if alone else found["SHARED_SPLIT"]

    assert {splits(rows, False) for rows in (1, 2, 7, 9, 32)} == {(2, 4)}
    assert {splits(rows, True) for rows in (1, 2, 7, 9, 32)} == {(2, 1)}


@pytest.mark.parametrize("kernel", [gpu.EXPERT_HIDDEN_TILES, gpu.EXPERT_SUM_TILES], ids=str)
def test_kernels_keep_the_rules(kernel):
    assert broken_rules(kernel) == []


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    ("bits", "group", "rows"), [(4, 64, 1), (4, 64, 32), (4, 32, 7), (8, 64, 7), (0, 0, 7)]
)
def test_kernels_compile_for_cuda(bits, group, rows, tmp_path):
    """In the geometry of Qwen3.6-35B-A3B: no spills, and registers for all of a threadgroup."""
    words = (lambda n: n * bits // 32) if bits else (lambda n: n)
    up, alone = ((*n, 512, words(2048)) for n in ((256,), ()))
    downs = [(*n, 2048, words(512)) for n in ((256,), ())]
    bank = ((up, bits, group, B),) * 2 + ((downs[0], bits, group, B),)
    shared = ((alone, bits, group, B),) * 2 + ((downs[1], bits, group, B),)
    pair = launches((rows, 2048), B, B, 8, 8 * rows, bank, shared, (256, B), None, False, True)
    assert pair is not None
    f, i, matrix = mx.float32, mx.int32, [mx.uint32 if bits else B, B, B]
    inputs = [mx.uint32, *4 * matrix, i, i, i], [B, B, B, *2 * matrix, i, i, i, f, B, f]
    for launch, dtypes in zip(pair, inputs, strict=True):
        assert launch is not None
        source = tmp_path / f"{launch.kernel.name}.cu"
        outputs = [B] * len(launch.kernel.outputs)
        source.write_text(cuda_source(launch.kernel, dtypes, outputs, dict(launch.template)))
        flags = ["-arch=sm_90", "-std=c++17", "-cubin", "-Werror=all-warnings", "-Xptxas", "-v"]
        done = subprocess.run(
            [str(NVCC), *flags, str(source), "-o", str(tmp_path / "kernel.cubin")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "0 bytes spill stores" in done.stderr, done.stderr
        words_of = done.stderr.split()
        registers = int(words_of[words_of.index("registers,") - 1])
        print(launch.kernel.name, bits, rows, registers, launch.threadgroup[0])
        spare = 8  # for other compilers, which drivers bring along
        assert (-(-registers // 8) * 8 + spare) * launch.threadgroup[0] <= 65536
