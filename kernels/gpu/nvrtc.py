"""Nvrtc: CUDA's run-time compiler, the one that MLX has loaded."""

import ctypes
import importlib.util
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12")
_TEXT = ctypes.c_char_p


class CompileError(Exception):
    """Nothing was compiled; why, in words."""


def compiled(
    text: str, expression: str, headers: Mapping[str, str], architecture: str
) -> tuple[str, bytes]:
    """The symbol of the kernel that a C++ expression names, and machine code with it.

    headers: what includes of these names give; other includes are looked for in CUDA's toolkit.
    architecture: of the GPU it is for, "sm_90". CompileError where there is no compiler, or it
    refuses.
    """
    library, program = _library(), ctypes.c_void_p()
    names, bodies = (_texts(side) for side in (headers.keys(), headers.values()))
    source, wanted = text.encode(), expression.encode()
    what = (ctypes.byref(program), source, b"kernel.cu", len(headers), bodies, names)
    _check(library, library.nvrtcCreateProgram(*what))
    try:
        _check(library, library.nvrtcAddNameExpression(program, wanted))
        options = [f"--gpu-architecture={architecture}", f"--include-path={_toolkit()}"]
        status = library.nvrtcCompileProgram(program, len(options), _texts(options))
        if status:
            raise CompileError(_log(library, program))
        symbol, size = _TEXT(), ctypes.c_size_t()
        _check(library, library.nvrtcGetLoweredName(program, wanted, ctypes.byref(symbol)))
        _check(library, library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        _check(library, library.nvrtcGetCUBIN(program, code))
        assert symbol.value is not None
        return symbol.value.decode(), code.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _texts(texts: Any) -> Any:
    encoded = [text.encode() for text in texts]
    return (_TEXT * len(encoded))(*encoded)


def _log(library: Any, program: Any) -> str:
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value + 1)
    library.nvrtcGetProgramLog(program, log)
    return log.value.decode(errors="replace").strip()


def _check(library: Any, status: int) -> None:
    if status:
        library.nvrtcGetErrorString.restype = _TEXT
        raise CompileError(library.nvrtcGetErrorString(status).decode())


@cache
def _library() -> Any:
    # one that is loaded already, before one that is not
    for mode in (os.RTLD_NOW | os.RTLD_NOLOAD, os.RTLD_NOW):
        for name in LIBRARIES:
            with suppress(OSError):
                return ctypes.CDLL(name, mode=mode)
    raise CompileError(f"no {' or '.join(LIBRARIES)}")


@cache
def _toolkit() -> Path:
    """The folder of CUDA's headers: where MLX looks for it."""
    folders: list[Path] = []
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec("nvidia")
        for place in (spec and spec.submodule_search_locations) or ():
            folders += [Path(place) / "cu13" / "include", Path(place) / "cuda_runtime" / "include"]
    homes: Sequence[str | None] = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders += [Path(home) / "include" for home in (*homes, "/usr/local/cuda") if home]
    for folder in folders:
        if (folder / "cuda_bf16.h").is_file():
            return folder
    raise CompileError(f"no cuda_bf16.h in {', '.join(map(str, folders))}")
