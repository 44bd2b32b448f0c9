"""Kernels broken on purpose, one per class of fault: each is found, and named with its line."""

import mlx.core as mx
import numpy as np
import pytest

from specdec.kernels.gpu.kernel import MetalKernel
from tests.metal.build import compiler
from tests.metal.run import KernelFault, run_msl

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")

THREADS = 64
X = mx.arange(THREADS, dtype=mx.float32)

NEIGHBOUR = """
SHARED(float, shared, 64);
uint i = thread_index_in_threadgroup;
shared[i] = x[i];
{barrier}
out[i] = shared[63 - i];
"""
ALL_BARRIERS = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@pytest.fixture
def run(tmp_path):
    """Runs a body over x [64] with one threadgroup of 64 threads, unless told otherwise."""

    def run(body, groups=1, size=THREADS, **options):
        (tmp_path / "broken.metal").write_text(body)
        kernel = MetalKernel("broken", ("x",), ("out",), folder=tmp_path)
        grid = (groups * THREADS, 1, 1)
        return run_msl(kernel, [X], [(size,)], [mx.float32], grid, (THREADS, 1, 1), **options)[0]

    return run


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            "if (thread_index_in_threadgroup < 40) {\nthreadgroup_barrier(mem_flags::mem_none);\n}",
            r"threadgroup_barrier in line \d+ is reached by thread \d+, but .* \d+ has returned",
        ),
        (
            "if (thread_index_in_threadgroup > 3) {\nthreadgroup_barrier(mem_flags::mem_none);\n"
            "} else {\nthreadgroup_barrier(mem_flags::mem_none);\n}",
            r"threadgroup_barrier in line \d+ .* waits at threadgroup_barrier in line \d+",
        ),
        (
            "if (thread_index_in_simdgroup < 7) {\nout[0] = simd_sum(x[0]);\n}",
            r"simd_sum in line \d+ is reached by thread \d+, but thread \d+ has returned",
        ),
        (
            "float v = x[0];\nif (thread_index_in_simdgroup < 7) {\nv = simd_sum(v);\n}\n"
            "out[0] = simd_max(v);",
            r"simd_sum in line \d+ .* waits at simd_max in line \d+",
        ),
    ],
    ids=["barrier not by all", "two barriers", "simd not by all", "two simd operations"],
)
def test_meetings_that_not_all_reach(run, body, words, order):
    with pytest.raises(KernelFault, match=words) as fault:
        run(body, order=order)
    assert "\n  " in str(fault.value)  # the line itself is quoted


@pytest.mark.parametrize("at", [-1, THREADS, THREADS + 500])
def test_writes_out_of_bounds_without_a_sanitizer(run, at):
    with pytest.raises(KernelFault, match=r"write out of bounds: byte .* out, which has 256"):
        run(f"out[{at}] = 1.0f;")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("out[int(x[0]) + 64] = 1.0f;", "heap-buffer-overflow"),
        ("out[0] = x[int(x[0]) + 64];", "heap-buffer-overflow"),
        ("out[0] = x[int(x[0]) - 1];", "heap-buffer-overflow"),
        (
            "SHARED(float, s, 64);\ns[thread_index_in_threadgroup + 1] = 1.0f;\nout[0] = s[0];",
            "out of bounds",
        ),
        (
            "SHARED(float, s, 64);\nauto p = s + thread_index_in_threadgroup;\np[1] = 1.0f;",
            "heap-buffer-overflow",
        ),
        ("float a[4];\nfor (int i = 0; i < 5; ++i) a[i] = x[i];\nout[0] = a[1];", "out of bounds"),
        ("float4 v = LOAD(float4, x + 1);\nout[0] = v.x;", "misaligned address"),
        ("out[0] = float(1 << (int(x[40])));", "shift exponent 40"),
    ],
    ids=[
        "write behind",
        "read behind",
        "read before",
        "threadgroup index",
        "threadgroup pointer",
        "local array",
        "misaligned vector",
        "shift",
    ],
)
def test_the_memory_sanitizer_names_fault_and_line(run, body, words):
    with pytest.raises(KernelFault, match=words) as fault:
        run(body, sanitize="memory")
    assert "\n  " in str(fault.value)


def test_a_missing_barrier_shows_in_the_order_of_threads(run):
    good = NEIGHBOUR.format(barrier=ALL_BARRIERS)
    expected = np.arange(THREADS)[::-1]
    for order in ("forward", "reverse"):
        np.testing.assert_array_equal(run(good, order=order), expected)
    bad = NEIGHBOUR.format(barrier="")
    forward, reverse = run(bad, order="forward"), run(bad, order="reverse")
    assert not np.array_equal(forward, reverse, equal_nan=True)
    assert np.isnan(forward).any()  # threadgroup memory begins as NaN


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_the_race_detector_finds_a_missing_barrier(run, order):
    good = NEIGHBOUR.format(barrier=ALL_BARRIERS)
    run(good, groups=3, order=order, sanitize="races")
    for barrier in ("", "simdgroup_barrier(mem_flags::mem_threadgroup);", "simd_sum(1.0f);"):
        with pytest.raises(KernelFault, match=r"data race in line \d+ and in line \d+"):
            run(NEIGHBOUR.format(barrier=barrier), order=order, sanitize="races")


def test_the_race_detector_finds_what_both_orders_hide(run):
    # the second use of the array waits for nobody, yet comes last in either order
    body = NEIGHBOUR.format(barrier=ALL_BARRIERS) + "shared[i] = 2.0f * x[i];\n"
    body += ALL_BARRIERS + "\nout[i] += shared[i];\n"
    expected = np.arange(THREADS)[::-1] + 2 * np.arange(THREADS)
    hidden = body.replace("shared[63 - i]", "shared[(i / 32) * 32 + (i + 1) % 32]")
    assert run(body, order="forward").shape == expected.shape
    for source in (body, hidden):
        with pytest.raises(KernelFault, match="data race"):
            run(source, sanitize="races")


def test_the_race_detector_finds_threadgroups_that_write_the_same_place(run):
    body = "out[thread_position_in_threadgroup.x] = float(threadgroup_position_in_grid.x);"
    assert run(body, groups=2, order="forward")[0] == 1
    assert run(body, groups=2, order="reverse")[0] == 0
    crossed = body.replace("[thread_position_in_threadgroup.x]", "[thread_position_in_grid.x / 2]")
    with pytest.raises(KernelFault, match="data race"):
        run(crossed, groups=2, sanitize="races")


def test_a_wrong_reduction_gives_wrong_numbers(run):
    steps = "".join(f"v += simd_shuffle_xor(v, {step});\n" for step in (1, 2, 4, 8, 16))
    body = "uint i = thread_index_in_threadgroup;\nfloat v = x[i];\n{steps}out[i] = v;"
    expected = np.arange(THREADS).reshape(2, 32).sum(1).repeat(32)
    np.testing.assert_array_equal(run(body.format(steps=steps)), expected)
    short = steps.replace("v += simd_shuffle_xor(v, 8);\n", "")
    assert (run(body.format(steps=short)) != expected).any()


def test_outputs_threadgroup_memory_and_locals_begin_as_poison(run):
    out = run("if (thread_index_in_threadgroup != 5) out[thread_index_in_threadgroup] = 0.0f;")
    assert np.flatnonzero(np.isnan(out)).tolist() == [5]
    assert np.isnan(run("SHARED(float, s, 4);\nout[thread_index_in_threadgroup] = s[1];")).all()
    # the second group must not find what the first one left
    body = "SHARED(float, s, 1);\nout[threadgroup_position_in_grid.x] = s[0];\n"
    body += "threadgroup_barrier(mem_flags::mem_threadgroup);\ns[0] = 3.0f;"
    assert np.isnan(run(body, groups=2)[1])
    assert (
        np.abs(run("float sum;\nsum += x[0];\nout[thread_index_in_threadgroup] = sum;")) > 1e30
    ).all()
    assert (run("", init_value=2.5) == 2.5).all()


def test_more_threadgroup_memory_than_a_gpu_has(run):
    with pytest.raises(KernelFault, match="32772 bytes of threadgroup memory, the limit is 32768"):
        run("SHARED(float, a, 8192);\nSHARED(float, b, 1);\na[0] = 0.0f;\nb[0] = 0.0f;")


def test_what_is_no_kernel_does_not_compile(run):
    with pytest.raises(RuntimeError, match=r"kernel\.metal:\d+:.*nonsense"):
        run("nonsense(x);")


def test_launches_that_cannot_be_meant_are_refused(tmp_path):
    kernel = MetalKernel("broken", ("x",), ("out",), ("N",), folder=tmp_path)
    for grid, threadgroup, template, words in [
        ((33, 1, 1), (32, 1, 1), {"N": 1}, "not made of whole threadgroups"),
        ((2048, 1, 1), (2048, 1, 1), {"N": 1}, "expected 1 to 1024"),
        ((32, 1, 1), (32, 1, 1), {"M": 1}, "template arguments M, expected N"),
    ]:
        with pytest.raises(ValueError, match=words):
            kernel.launch([(1,)], [mx.float32], grid, threadgroup, template)
