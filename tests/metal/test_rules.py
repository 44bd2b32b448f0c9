"""Each rule is broken by what breaks it, and by none of the sample kernels."""

import mlx.core as mx
import pytest

from specdec.kernels.gpu.kernel import MetalKernel
from specdec.kernels.gpu.vocabulary import definitions, without_comments
from tests.metal.rules import broken_rules
from tests.metal.samples import RMS_NORM, ROW_SUM, WORDS


@pytest.mark.parametrize("kernel", [ROW_SUM, RMS_NORM, WORDS], ids=lambda k: k.name)
def test_samples_keep_the_rules(kernel):
    assert broken_rules(kernel) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("const device float* p = x;", "device names an address space"),
        ("threadgroup float s[4];", "threadgroup names an address space"),
        ("float a = 1.0;", "1.0 a double"),
        ("float a = x[0] * 1e-6;", "1e-6 a double"),
        ("uint n = threads_per_grid.x;", "threads_per_grid differs"),
        ("float2 v = float2(1.0f, 2.0f);", "no constructors"),
        ("atomic_fetch_add_explicit(out, 1, memory_order_relaxed);", "no fixed order"),
    ],
)
def test_each_offence_is_named(line, words, tmp_path):
    (tmp_path / "bad.metal").write_text(f"out[0] = x[0];\n{line}\n")
    offences = broken_rules(MetalKernel("bad", ("x",), ("out",), folder=tmp_path))
    assert len(offences) == 1
    assert words in offences[0]
    assert line in offences[0]


def test_a_kernel_says_into_which_inputs_it_writes(tmp_path):
    (tmp_path / "bad.metal").write_text("auto to = WRITABLE(float, x);\nto[0] = 1.0f;\n")
    assert "no input" in broken_rules(MetalKernel("bad", ("x",), ("out",), folder=tmp_path))[0]
    kernel = MetalKernel("bad", ("x",), ("out",), folder=tmp_path, writes=("x",))
    assert broken_rules(kernel) == []
    (tmp_path / "bad.metal").write_text("out[0] = x[0];\n")
    assert (
        "('x',)" in broken_rules(MetalKernel("bad", ("x",), ("out",), (), (), ("x",), tmp_path))[0]
    )


def test_a_kernel_gets_the_words_it_uses_and_no_others():
    assert RMS_NORM.header("metal").splitlines()[0] == "#define HELPER inline"
    header = RMS_NORM.header("cuda")
    for word in ("HELPER", "simd_sum", "thread_index_in_threadgroup", "rsqrt", "square"):
        assert word in header
    for word in ("SHARED", "simd_max", "tanh", "//"):
        assert word not in header
    assert len(header) < 1500


def test_definitions_bring_what_they_need_in_the_order_of_the_file():
    vocabulary = (
        "// words\n#define A 1\n\nint b() { return A; }\nusing C = int;\nC d() { return b(); }"
    )
    assert definitions(vocabulary, "x = d();") == "".join(
        f"{line}\n" for line in vocabulary.splitlines() if line and not line.startswith("//")
    )
    assert definitions(vocabulary, "x = A + bd + Cd;") == "#define A 1\n"
    assert without_comments("  a; // b\n\n// c\n\td;") == "a;\nd;\n"


def test_nothing_runs_without_a_gpu_and_nothing_is_read_before(tmp_path):
    kernel = MetalKernel("absent", ("x",), ("out",), folder=tmp_path)
    launch = kernel.launch([(1,)], [mx.float32], (1, 1, 1), (1, 1, 1))
    if not mx.metal.is_available() and not mx.cuda.is_available():
        with pytest.raises(RuntimeError, match="kernel absent: MLX has no GPU here"):
            launch(mx.zeros(1))
    else:
        with pytest.raises(FileNotFoundError):
            launch(mx.zeros(1))
