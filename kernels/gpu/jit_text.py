"""JitText: what MLX hands to CUDA's compiler for a kernel, and the name it gives the outcome.

MLX shows neither, so this follows MLX's own sources (mlx/backend/cuda/custom_kernel.cpp), for the
versions in KNOWN: kept.py compiles from it before MLX does. A text that is not MLX's to the letter
does no harm, MLX then does not find what was compiled and compiles itself.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx

KNOWN = ("0.32.4",)  # versions of MLX
TYPES = {
    mx.bool_: "bool",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
}
# as they stand in the name of a kernel
_NAMES = {mx.float16: "float16_t", mx.bfloat16: "bfloat16_t", mx.float32: "float"}
_NAMES |= {mx.int32: "int32_t", mx.uint32: "uint32_t"}
# what a text may ask of an input, behind its name, and of what type it is
SHAPES = {"shape": "Shape", "strides": "Strides", "ndim": "int"}
_SEED = 0xC70F6907  # of std::hash

SHAPE_TYPES = """template <typename T>
struct Ten {
  T values[10];
  __device__ T operator[](unsigned i) const { return values[i]; }
};
using Shape = Ten<int32_t>;
using Strides = Ten<int64_t>;
"""
# What the text includes, in a few lines: MLX's own header and those of the toolkit that it includes
# take longer to read than a kernel to compile.
HEADERS = {
    "mlx/backend/cuda/device/utils.cuh": f"""#pragma once
using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long;
#include <cuda_bf16.h>
#include <cuda_fp16.h>
namespace mlx::core::cu {{
{SHAPE_TYPES}}}
""",
    "cooperative_groups.h": "#pragma once\nnamespace cooperative_groups {}\n",
}


@dataclass(frozen=True)
class JitText:
    """name: of the kernel in MLX, a C++ expression without its namespace."""

    name: str
    text: str

    @property
    def kernel(self) -> str:
        """Its whole name."""
        return f"mlx::core::cu::{self.name}"

    @property
    def module(self) -> str:
        """What MLX names the compiled text."""
        return f"{self.name}_{_hash(self.text.encode()):x}"


def jit_text(
    name: str,
    header: str,
    source: str,
    inputs: Sequence[tuple[str, mx.Dtype, int]],
    outputs: Sequence[tuple[str, mx.Dtype]],
    template: Sequence[tuple[str, int | bool | mx.Dtype]],
) -> JitText:
    """The text for inputs (name, dtype, dimensions) and outputs (name, dtype), and the arguments of
    mx.fast.cuda_kernel and of its call. KeyError for a dtype that is not known here."""
    parameters = []
    for each, dtype, dimensions in inputs:
        parameters.append(f"    const {TYPES[dtype]}* {each}")
        for suffix, kind in SHAPES.items():
            if dimensions and f"{each}_{suffix}" in source:
                parameters.append(f"    const __grid_constant__ {kind} {each}_{suffix}")
    parameters += [f"    {TYPES[dtype]}* {each}" for each, dtype in outputs]
    constants = "".join(constant(*argument) for argument in template)
    whole = f"custom_kernel_{name}" + "".join(f"_{_short(value)}" for _, value in template)
    return JitText(
        whole,
        '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'
        f"{header}namespace mlx::core::cu {{\n\nnamespace cg = cooperative_groups;\n\n"
        f"__global__ void {whole}(\n" + ",\n".join(parameters) + ") {\n"
        f"{constants}{constants and chr(10)}{source}\n}}\n\n}} // namespace mlx::core::cu\n",
    )


def constant(name: str, value: int | bool | mx.Dtype) -> str:
    """A template argument in a kernel's text."""
    if isinstance(value, mx.Dtype):
        return f"  using {name} = {TYPES[value]};\n"
    kind = "bool" if isinstance(value, bool) else "int"
    return f"  constexpr {kind} {name} = {str(value).lower()};\n"


def _short(value: int | bool | mx.Dtype) -> str:
    if isinstance(value, bool):
        return "t" if value else "f"
    return _NAMES[value] if isinstance(value, mx.Dtype) else str(value)


def _hash(data: bytes) -> int:
    """std::hash of a string, as the standard library of GNU C++ computes it."""
    return int(_standard_library()._ZSt11_Hash_bytesPKvmm(data, len(data), _SEED))


@cache
def _standard_library() -> Any:
    library = ctypes.CDLL("libstdc++.so.6")
    hash_bytes = library._ZSt11_Hash_bytesPKvmm
    hash_bytes.restype = ctypes.c_size_t
    hash_bytes.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t]
    return library
