"""Kept: CUDA kernels compiled once for an installation.

MLX keeps what it compiles in a folder, but not the kernels of mx.fast.cuda_kernel: every process
compiled ours anew, some 60 for a small model, a second and more each. It does look there for them,
though. So what MLX would compile at a kernel's first launch is compiled before, by the same
compiler from the same text (jit_text.py), several at a time, and left where MLX looks. Where that
cannot be, and in versions of MLX that are not known, MLX compiles as it did.
"""

import hashlib
import os
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock, Semaphore, Thread

import mlx.core as mx

from specdec.kernels.gpu.included import cache_folder, put
from specdec.kernels.gpu.jit_text import HEADERS, KNOWN, JitText
from specdec.kernels.gpu.nvrtc import compiled

WORKERS = 4  # each takes some 100 MB while it compiles
LONGEST = 240  # letters of a file's name, before its ending
# Measured on an H100: 20 to 50 s each for MLX's products of whole prompts, 5.1 GB at the most.
_FIRST = "(a first run compiles MLX's too: minutes, and up to 5 GB)"


class _Work:
    """What this process asked for: names of modules, and threads that still compile some.

    The threads are daemons: nobody waits for them when the interpreter ends.
    """

    def __init__(self) -> None:
        self.asked: set[str] = set()
        self.threads: list[Thread] = []
        self.free = Semaphore(min(WORKERS, os.cpu_count() or 1))
        self.said: set[str] = set()
        self.lock = Lock()
        self.failed = False

    def say(self, kind: str, words: str) -> None:
        """Once of each kind."""
        with self.lock:
            new = kind not in self.said
            self.said.add(kind)
        if new:
            with suppress(OSError, ValueError):  # a closed stderr
                print(words, file=sys.stderr, flush=True)

    def fail(self, why: Exception) -> None:
        """MLX can do without: from now on it does."""
        self.failed = True
        reason = (str(why).splitlines() or [type(why).__name__])[0]
        self.say("failed", f"CUDA kernels are compiled by every process anew: {reason}")


_work = _Work()


def _forget() -> None:
    """In a child process, where the threads are not."""
    global _work
    _work = _Work()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def keep(text: JitText) -> None:
    """Have the text lie compiled where MLX looks for it, by the time of `wait`."""
    work = _work
    if work.failed or text.module in work.asked:
        return
    work.asked.add(text.module)
    folder = cache_folder()
    if folder is None or _version() not in KNOWN or len(text.module) > LONGEST:
        return
    if _is_kept(folder, text):
        return
    work.say("compiling", f"compiling CUDA kernels; they are kept in {folder} {_FIRST}")
    thread = Thread(target=_compile, args=(work, folder, text), name="nvrtc", daemon=True)
    work.threads.append(thread)
    thread.start()


def wait() -> None:
    """Until all that was to be compiled is; to be called before MLX is to compute something."""
    threads = _work.threads
    while threads:
        threads[-1].join()
        with suppress(IndexError):  # two may wait
            threads.pop()


@cache
def made_for() -> str:
    """What compiled code depends on beside the text; part of it, so that MLX tells them apart."""
    headers = hashlib.sha256("".join(HEADERS.values()).encode()).hexdigest()[:8]
    return f"{_architecture()} {headers}"


@cache
def _architecture() -> str:
    """Of the GPU, as its compiler names it."""
    info = mx.device_info(mx.Device(mx.gpu, 0))
    major, minor = (info.get(f"compute_capability_{part}", 0) for part in ("major", "minor"))
    return f"sm_{major}{minor}"


@cache
def _version() -> str:
    return version("mlx")  # half a millisecond


def _is_kept(folder: Path, text: JitText) -> bool:
    """As a whole: after a loss of power a file may be empty."""
    try:
        size = (folder / f"{text.module}.ptx").stat().st_size
        return _of_size(size) in (folder / f"{text.module}.txt").read_text("utf8", "replace")
    except OSError:
        return False


def _of_size(size: int) -> str:
    """A line that MLX, which looks for tabs, passes over."""
    return f"\n{size} bytes\n"


def _compile(work: _Work, folder: Path, text: JitText) -> None:
    with work.free:
        if work.failed:
            return
        try:
            symbol, code = compiled(text.text, text.kernel, HEADERS, _architecture())
            # MLX looks for the code first
            names = f"{text.kernel}\t{symbol}{_of_size(len(code))}"
            put(folder / f"{text.module}.txt", names.encode())
            put(folder / f"{text.module}.ptx", code)
        except Exception as why:  # whatever it is
            work.fail(why)
