"""Cuda: a kernel's text as MLX would give it to NVIDIA's compiler.

MLX shows this text only where it has a CUDA device, so its wrapping is repeated here. MLX's own
utils.cuh and the headers of the toolkit that it includes, of which the kernels use the array of a
shape, take longer to read than a kernel to compile: a few lines stand for them. HEADERS are those
of the toolkit.
"""

from collections.abc import Sequence

import mlx.core as mx

from specdec.kernels.gpu.jit_text import SHAPE_TYPES, SHAPES, TYPES, constant
from specdec.kernels.gpu.kernel import MetalKernel, Template

HEADERS = """#include <cuda/std/array>
#include <cuda/std/limits>
#include <cooperative_groups.h>
"""
PRELUDE = """#include <cstdint>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define inf __int_as_float(0x7f800000)
"""
OPENING = f"namespace mlx::core::cu {{\n{SHAPE_TYPES}"


def cuda_source(
    kernel: MetalKernel,
    input_dtypes: Sequence[mx.Dtype],
    output_dtypes: Sequence[mx.Dtype],
    template: Template | None = None,
) -> str:
    """The CUDA text of a kernel whose inputs have at least one dimension each."""
    parameters = []
    for name, dtype in zip(kernel.inputs, input_dtypes, strict=True):
        parameters.append(f"const {TYPES[dtype]}* {name}")
        for suffix, type_ in SHAPES.items():
            if f"{name}_{suffix}" in kernel.body:
                parameters.append(f"const __grid_constant__ {type_} {name}_{suffix}")
    for name, dtype in zip(kernel.outputs, output_dtypes, strict=True):
        parameters.append(f"{TYPES[dtype]}* {name}")
    arguments = template or {}
    constants = "".join(constant(name, arguments[name]) for name in kernel.template)
    return (
        f"{PRELUDE}{kernel.header('cuda')}{OPENING}"
        f"__global__ void custom_kernel_{kernel.name}({', '.join(parameters)}) {{\n"
        f"{constants}{kernel.body}\n}}\n}}\n"
    )
