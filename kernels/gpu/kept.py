"""Kept: CUDA kernels compiled once for an installation.

MLX keeps what it compiles in a folder, but not the kernels of mx.fast.cuda_kernel: every process
compiled ours anew, some 60 for a small model, a second and more each. It does look there for them,
though. So what MLX would compile at a kernel's first launch is compiled before, by the same
compiler from the same text (jit_text.py), several at a time, and left where MLX looks. Where that
cannot be, and in versions of MLX that are not known, MLX compiles as it did.
"""

import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import mlx.core as mx

from specdec.kernels.gpu.included import cache_folder
from specdec.kernels.gpu.jit_text import HEADERS, KNOWN, JitText
from specdec.kernels.gpu.nvrtc import compiled

WORKERS = 4  # each takes some 100 MB while it compiles
LONGEST = 240  # letters of a file's name, before its ending

_pending: dict[str, Future[None]] = {}


def keep(text: JitText) -> None:
    """Have the text lie compiled where MLX looks for it, by the time of `wait`."""
    folder = cache_folder()
    if version("mlx") not in KNOWN or folder is None or len(text.module) > LONGEST:
        return
    if text.module in _pending or _is_kept(folder, text):
        return
    _say(f"compiling CUDA kernels; they are kept in {folder}")
    _pending[text.module] = _workers().submit(_compile, folder, text)


def wait() -> None:
    """Until all that was to be compiled is; to be called before MLX is to compute something."""
    while _pending:
        _pending.popitem()[1].result()


def _is_kept(folder: Path, text: JitText) -> bool:
    """For this GPU: another one may have been in the machine, or share the folder."""
    try:
        names = (folder / f"{text.module}.txt").read_text(errors="replace")
        return (folder / f"{text.module}.ptx").is_file() and _made_for() in names.splitlines()
    except OSError:
        return False


def _made_for() -> str:
    """A line that MLX, which looks for tabs, passes over."""
    return "compute capability {}.{}".format(*_capability())


def _compile(folder: Path, text: JitText) -> None:
    try:
        symbol, code = compiled(text.text, text.kernel, HEADERS, _capability())
        # MLX looks for the code first
        names = f"{text.kernel}\t{symbol}\n{_made_for()}\n"
        _put(folder / f"{text.module}.txt", names.encode())
        _put(folder / f"{text.module}.ptx", code)
    except Exception as why:  # whatever it is: MLX can do without
        _say(f"CUDA kernels are compiled by every process anew: {why}")


def _put(file: Path, data: bytes) -> None:
    """As a whole or not at all."""
    part = file.with_suffix(f".{uuid4().hex}")
    try:
        part.write_bytes(data)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


@cache
def _capability() -> tuple[int, int]:
    info = mx.device_info(mx.Device(mx.gpu, 0))
    return int(info["compute_capability_major"]), int(info["compute_capability_minor"])


@cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1), "nvrtc")


@cache
def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)
