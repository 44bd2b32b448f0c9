"""Kernel texts as files: short for MLX, the same for CUDA's compiler."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from specdec.kernels.gpu import included as module
from specdec.kernels.gpu.included import included
from specdec.kernels.gpu.kernel import Template
from specdec.kernels.gpu.top_tokens import TOP
from tests.metal.cuda import OPENING, PRELUDE, cuda_source

NVCC = shutil.which("nvcc")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "ptx"))
    module.cache_folder.cache_clear()
    module._say.cache_clear()
    yield tmp_path / "ptx"
    module.cache_folder.cache_clear()


def file_of(include: str) -> Path:
    assert include.startswith('#include "')
    return Path(include.split('"')[1])


def test_a_file_holds_the_text_and_is_named_by_it(folder):
    first, second = included("int a;\n"), included("int b;\n")
    assert file_of(first).parent == folder
    assert file_of(first).read_text() == "int a;\n"
    assert file_of(second).read_text() == "int b;\n"
    file_of(first).write_text("half written")
    assert included("int a;\n") == first
    assert file_of(first).read_text() == "int a;\n"


def test_where_no_file_can_be_written_the_text_stands_for_itself(folder, capsys):
    folder.write_text("no folder")
    assert [included("int a;\n"), included("int b;\n")] == ["int a;\n", "int b;\n"]
    assert capsys.readouterr().err.count("cannot be kept as files") == 1


def test_what_cannot_be_written_is_said_once(folder, capsys, monkeypatch):
    def full(file, data):
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert [included("int a;\n"), included("int b;\n")] == ["int a;\n", "int b;\n"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(folder) in said
    assert "No space left" in said


def test_processes_of_one_number_do_not_meet(folder, capsys):
    """They may have one in containers that share the folder; here they are threads."""
    texts = [f"int a{i};\n" * 400 for i in range(40)]

    def write(_):
        return [included(text) for text in texts]

    with ThreadPoolExecutor(4) as threads:
        written = list(threads.map(write, range(4)))
    assert written[1:] == written[:-1]
    assert [file_of(include).read_text() for include in written[0]] == texts
    assert sorted(folder.iterdir()) == sorted(file_of(include) for include in written[0])
    assert capsys.readouterr().err == ""


def test_files_come_back(folder, monkeypatch):
    file = file_of(included("int a;\n"))
    file.write_bytes(b"\xff\xfe")  # no text at all
    included("int a;\n")
    assert file.read_text() == "int a;\n"

    # swept away between launches of two kinds
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **named: lambda **more: [])
    kernel, left = replace(TOP), []
    for width in (3, 4):
        template: Template = {"T": mx.float32, "WIDTH": width, "VALUES": 8, "VERDICT": False}
        launch = kernel.launch([(1, 9)], [mx.int32], (32, 1, 1), (32, 1, 1), template)
        launch(mx.zeros((1, 20)))
        left.append({file.name: file.read_text() for file in folder.iterdir()})
        shutil.rmtree(folder)
    assert len(left[0]) == 3
    assert left[1].items() < left[0].items()


def test_a_folder_that_no_include_can_name(monkeypatch, tmp_path, folder):
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / 'a"b'))
    assert included("int a;\n") == "int a;\n"


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_what_mlx_is_given_compiles_and_names_the_shapes_asked_for(folder, monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **options: given.update(options))
    TOP.on_cuda()
    assert len(given["source"]) + len(given["header"]) < 500
    assert "logits_shape" in given["source"]
    template: Template = {"T": mx.bfloat16, "WIDTH": 6, "VALUES": 8, "VERDICT": False}
    whole = cuda_source(TOP, [mx.bfloat16], [mx.int32], template)
    assert whole.startswith(PRELUDE + TOP.header("cuda") + OPENING)
    split = whole.replace(TOP.header("cuda"), given["header"]).replace(TOP.body, given["source"])
    assert len(split) < len(whole)
    built = []
    for name, text in (("whole", whole), ("split", split)):
        source = tmp_path / name / "kernel.cu"
        source.parent.mkdir()
        source.write_text(text)
        command = [str(NVCC), "-arch=sm_90", "-std=c++17", "-ptx", "kernel.cu", "-o", "kernel.ptx"]
        subprocess.run(command, check=True, cwd=source.parent)
        # symbols of headers carry a hash of the source
        built.append(re.sub("_INTERNAL_[0-9a-f]+", "", (source.parent / "kernel.ptx").read_text()))
    assert built[0] == built[1]
