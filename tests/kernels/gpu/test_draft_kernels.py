"""The small kernels of a drafted round keep the rules and compile for CUDA."""

import shutil
import subprocess

import mlx.core as mx
import pytest

from specdec.kernels.gpu.limits import Unsupported
from specdec.kernels.gpu.tapped import TAPPED
from specdec.kernels.gpu.walked import WALKED, walked
from tests.metal.cuda import cuda_source
from tests.metal.rules import broken_rules

NVCC = shutil.which("nvcc")
FLOAT, INT = mx.bfloat16, mx.int32
SOURCES = {
    "tapped": lambda: cuda_source(TAPPED, [INT, *[FLOAT] * 8], [FLOAT], {"T": FLOAT, "PARTS": 5}),
    "walked": lambda: cuda_source(WALKED, [INT, INT, INT], [INT, INT], {"LAYERS": 2, "BLOCK": 8}),
}


def test_rules():
    assert broken_rules(TAPPED) + broken_rules(WALKED) == []


def test_what_is_not_taken():
    with pytest.raises(Unsupported, match="33 rows"):
        walked(mx.zeros((33, 2), INT), mx.zeros(66, INT), mx.zeros(90, INT), 1, 4)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("name", SOURCES)
def test_cuda_compiles(name, tmp_path):
    source = tmp_path / "kernel.cu"
    source.write_text(SOURCES[name]())
    flags = ["-arch=sm_90", "-std=c++17", "-cubin", "-Werror=all-warnings"]
    command = [str(NVCC), *flags, str(source), "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
