"""Build: C++ programs of kernels, compiled once and kept by the hash of all that goes in."""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal, TypeAlias

Sanitize: TypeAlias = Literal["memory", "races"] | None

SHIM = Path(__file__).parent / "shim"
FLAGS = (
    "-std=c++17",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fsingle-precision-constant",  # an unsuffixed literal is a float in Metal
    "-ftrivial-auto-var-init=pattern",  # forgotten initial values show, and show the same always
    "-w",
)
SANITIZERS: dict[str | None, tuple[str, ...]] = {
    None: ("-O2",),
    "memory": ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "races": ("-O1", "-g1", "-fsanitize=thread"),
}


def compiler() -> str | None:
    """Where g++ is, if it is; on macOS the name means another compiler."""
    return shutil.which("g++") if sys.platform == "linux" else None


def built(program: str, sanitize: Sanitize) -> Path:
    """The executable of a program; RuntimeError with the compiler's words if it is no C++."""
    found = compiler()
    assert found is not None, "no g++ here"
    flags = (*FLAGS, *SANITIZERS[sanitize])
    key = hashlib.sha256("\0".join((program, found, *flags, _headers())).encode()).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"specdec-metal-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    kept = folder / key[:32]
    if kept.exists():
        return kept
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source = Path(work) / "kernel.cpp"
        source.write_text(program)
        target = Path(work) / "kernel"
        done = subprocess.run(
            [found, *flags, "-I", str(SHIM), str(source), "-o", str(target)],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the kernel does not compile:\n{done.stderr}")
        target.replace(kept)  # whole or not at all, whoever else builds it
    return kept


@functools.cache
def _headers() -> str:
    return "\0".join(path.read_text() for path in sorted(SHIM.glob("*.h")))
