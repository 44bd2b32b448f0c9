"""Compiled kernels that are kept: MLX's text and its name, the compiler, files, errors."""

import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from threading import Event
from time import sleep

import mlx.core as mx
import pytest

from specdec.kernels.array import evaluate, start, to_numpy
from specdec.kernels.gpu import included, jit_text, kept, kernel, nvrtc
from specdec.kernels.gpu.jit_text import HEADERS, JitText
from specdec.kernels.gpu.kernel import Template
from specdec.kernels.gpu.nvrtc import CompileError, compiled
from specdec.kernels.gpu.routing import ROUTE
from tests.metal.build import compiler

TEXT = """
#include "mlx/backend/cuda/device/utils.cuh"

#include <cooperative_groups.h>

#define TWICE 2
namespace mlx::core::cu {

namespace cg = cooperative_groups;

__global__ void custom_kernel_twice_bfloat16_t_3_t_f(
    const __nv_bfloat16* x,
    const __grid_constant__ Shape x_shape,
    const float* eps,
    int32_t* out) {
  using T = __nv_bfloat16;
  constexpr int N = 3;
  constexpr bool YES = true;
  constexpr bool NO = false;

out[0] = TWICE * N * x_shape[0];
// x_shape eps_shape

}

} // namespace mlx::core::cu
"""


def twice():
    return jit_text.jit_text(
        "twice",
        "#define TWICE 2\n",
        "out[0] = TWICE * N * x_shape[0];\n// x_shape eps_shape\n",
        [("x", mx.bfloat16, 2), ("eps", mx.float32, 0)],
        [("out", mx.int32)],
        [("T", mx.bfloat16), ("N", 3), ("YES", True), ("NO", False)],
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where MLX would look."""
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "ptx"))
    included.cache_folder.cache_clear()
    monkeypatch.setattr(kept, "KNOWN", (version("mlx"),))
    monkeypatch.setattr(kept, "_architecture", lambda: "sm_90")
    monkeypatch.setattr(kept, "_work", kept._Work())
    yield tmp_path / "ptx"
    kept.wait()
    included.cache_folder.cache_clear()


@pytest.fixture
def anew(monkeypatch):
    """Begin as another process does."""
    return lambda: monkeypatch.setattr(kept, "_work", kept._Work())


@pytest.fixture
def asked(monkeypatch):
    """What is compiled, by nobody."""
    texts = []

    def compile_nothing(text, expression, headers, architecture):
        texts.append((text, expression, architecture))
        return "_Zsymbol", b"\x7fELF code"

    monkeypatch.setattr(kept, "compiled", compile_nothing)
    return texts


def test_the_text_is_mlx_s():
    assert twice().text == TEXT
    assert twice().kernel == "mlx::core::cu::custom_kernel_twice_bfloat16_t_3_t_f"


@pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")
def test_its_name_has_the_hash_of_the_standard_library(tmp_path):
    texts = ["", "abc", TEXT]
    (tmp_path / "main.cpp").write_text(
        "#include <functional>\n#include <iostream>\n#include <string>\nint main() {\n"
        + "".join(
            f'std::cout << std::hash<std::string>()(R"=({text})=") << "\\n";\n' for text in texts
        )
        + "}\n"
    )
    made = tmp_path / "main"
    subprocess.run([str(compiler()), str(tmp_path / "main.cpp"), "-o", str(made)], check=True)
    printed = subprocess.run([made], capture_output=True, text=True, check=True).stdout.split()
    for text, number in zip(texts, printed, strict=True):
        assert JitText("name", text).module == f"name_{int(number):x}"


def test_what_is_compiled_lies_where_mlx_looks(folder, asked, anew, capsys):
    text = twice()
    for _ in range(2):
        for _ in range(2):
            kept.keep(text)
            kept.wait()
        anew()
    assert asked == [(TEXT, text.kernel, "sm_90")]
    assert (folder / f"{text.module}.ptx").read_bytes() == b"\x7fELF code"
    names = f"{text.kernel}\t_Zsymbol\n9 bytes\n"
    assert (folder / f"{text.module}.txt").read_text() == names
    assert len(list(folder.iterdir())) == 2
    told = f"compiling CUDA kernels; they are kept in {folder} "
    assert capsys.readouterr().err.startswith(told)


def test_a_file_of_another_size_is_made_again(folder, asked, anew):
    text = twice()
    kept.keep(text)
    kept.wait()
    (folder / f"{text.module}.ptx").write_bytes(b"")
    anew()
    kept.keep(text)
    kept.wait()
    assert len(asked) == 2
    assert (folder / f"{text.module}.ptx").read_bytes() == b"\x7fELF code"


def test_the_text_tells_gpus_apart(monkeypatch):
    """Or MLX would load what was made for another one."""
    for name in ("sm_86 headers", "sm_90 headers"):
        monkeypatch.setattr(kernel, "made_for", lambda name=name: name)
        assert ROUTE.included()[1].endswith(f"// logits_shape\n// {name}\n")


def test_as_many_as_there_are_workers_at_once(folder, monkeypatch):
    running, most = 0, []

    def count(*_):
        nonlocal running
        running += 1
        most.append(running)
        sleep(0.02)
        running -= 1
        return "_Zsymbol", b"code"

    monkeypatch.setattr(kept, "compiled", count)
    for number in range(12):
        kept.keep(JitText(f"name{number}", TEXT))
    kept.wait()
    assert len(most) == 12
    assert max(most) <= kept.WORKERS
    assert len(list(folder.iterdir())) == 24


@pytest.mark.parametrize("begin", [evaluate, start, to_numpy])
def test_nothing_is_computed_before_all_is_compiled(begin, folder, monkeypatch):
    ready, text = Event(), twice()

    def compile_late(*_):
        assert ready.wait(30)
        return "_Zsymbol", b"code"

    monkeypatch.setattr(kept, "compiled", compile_late)
    kept.keep(text)
    assert not (folder / f"{text.module}.ptx").exists()
    ready.set()
    begin(mx.array(1.0))
    assert (folder / f"{text.module}.ptx").exists()


@pytest.mark.parametrize(
    "why", [CompileError("kernel.cu(1): error\nmore"), OSError("full"), KeyError(1)]
)
def test_an_error_is_told_once_and_left_to_mlx(why, folder, monkeypatch, capsys):
    tried = []

    def fail(*_):
        tried.append(1)
        raise why

    monkeypatch.setattr(kept, "compiled", fail)
    for number in range(3):
        kept.keep(JitText(f"name{number}", TEXT))
        kept.wait()
    assert list(folder.iterdir()) == []
    said = capsys.readouterr().err.splitlines()[1:]
    reason = str(why).splitlines()[0]
    assert said == [f"CUDA kernels are compiled by every process anew: {reason}"]
    assert len(tried) == 1


def test_versions_that_are_not_known_and_long_names_are_left_to_mlx(folder, asked, monkeypatch):
    longest = JitText("l" * (kept.LONGEST - 17), TEXT)
    kept.keep(JitText(f"l{longest.name}", TEXT))
    kept.wait()
    assert asked == []
    kept.keep(longest)
    kept.wait()
    assert (folder / f"{longest.module}.ptx").is_file()
    monkeypatch.setattr(kept, "KNOWN", ("0.1",))
    kept.keep(twice())
    kept.wait()
    assert len(asked) == 1


def test_without_a_folder_nothing_is_kept(folder, asked):
    folder.write_text("no folder")
    kept.keep(twice())
    kept.wait()
    assert asked == []


def test_a_launch_s_first_call_asks_for_what_mlx_compiles(folder, asked, monkeypatch):
    """Header and source are those that MLX is given, inputs as they come."""
    given = {}

    def cuda_kernel(**told):
        given.update(told)
        return lambda inputs, **options: [mx.zeros(shape) for shape in options["output_shapes"]]

    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    monkeypatch.setattr(kernel, "made_for", lambda: "sm_90 headers")
    template: Template = {"T": mx.float32, "EXPERTS": 8, "TOP_K": 2, "START": 0, "NORMALIZE": True}
    launch = replace(ROUTE).launch(
        [(1, 2), (1, 2), (2, 2)],
        [mx.int32, mx.float32, mx.int32],
        grid=(256, 1, 1),
        threadgroup=(256, 1, 1),
        template=template,
    )
    for _ in range(2):
        launch(mx.zeros((1, 8)))
    kept.wait()
    ((text, expression, _),) = asked
    assert expression == "mlx::core::cu::custom_kernel_route_float_8_2_0_t"
    assert given["header"] in text
    assert given["source"] in text
    assert given["source"].endswith("// logits_shape\n// sm_90 headers\n")
    parameters = text[text.index("(\n") : text.index(") {\n")]
    assert parameters == (
        "(\n    const float* logits,\n    const __grid_constant__ Shape logits_shape,\n"
        "    int32_t* experts,\n    float* weights,\n    int32_t* used"
    )


def _nvrtc():
    try:
        nvrtc._library()
        nvrtc._toolkit()
    except CompileError:
        return False
    return True


@pytest.mark.skipif(not _nvrtc(), reason="needs CUDA's run-time compiler and its headers")
def test_the_compiler():
    text = twice()
    symbol, code = compiled(text.text, text.kernel, HEADERS, "sm_90")
    assert code[:4] == b"\x7fELF"
    assert symbol.encode() in code
    assert "custom_kernel_twice" in symbol
    with pytest.raises(CompileError, match="TWICE"):
        compiled(text.text.replace("#define", "//"), text.kernel, HEADERS, "sm_90")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libraries are named so on Linux")
def test_without_a_compiler_or_its_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc, "LIBRARIES", ("libnvrtc-there-is-none.so",))
    with pytest.raises(CompileError, match=r"no libnvrtc-there-is-none\.so"):
        nvrtc._library.__wrapped__()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr("pathlib.Path.is_file", lambda self: False)
    with pytest.raises(CompileError, match=f"no cuda_bf16.h in .*{tmp_path}/include"):
        nvrtc._toolkit.__wrapped__()
