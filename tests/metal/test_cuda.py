"""The CUDA form of kernels compiles for an H100, with the warnings of unset variables as errors."""

import shutil
import subprocess

import mlx.core as mx
import pytest

from tests.metal.cuda import HEADERS, cuda_source
from tests.metal.samples import RMS_NORM, ROW_SUM, WORDS

NVCC = shutil.which("nvcc")

SOURCES = {
    "words": lambda: HEADERS + cuda_source(WORDS, [mx.uint32], [mx.float32]),
    "row sum, bfloat16": lambda: cuda_source(
        ROW_SUM, [mx.bfloat16, mx.int32], [mx.bfloat16], {"T": mx.bfloat16, "THREADS": 256}
    ),
    "norm, float16": lambda: cuda_source(
        RMS_NORM, [mx.float16, mx.float16, mx.float32], [mx.float16], {"T": mx.float16}
    ),
}


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("name", SOURCES)
def test_samples_compile_for_cuda(name, tmp_path):
    source = tmp_path / "kernel.cu"
    source.write_text(SOURCES[name]())
    target = tmp_path / "kernel.cubin"
    flags = ["-arch=sm_90", "-std=c++17", "-cubin", "-Werror=all-warnings"]
    done = subprocess.run(
        [str(NVCC), *flags, str(source), "-o", str(target)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert target.stat().st_size > 0
