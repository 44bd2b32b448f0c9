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
    None: ("-O1",),
    "memory": ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
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
    folder = Path(tempfile.gettempdir()) / f"specdec-metal-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    kept = folder / _key(program, found, *flags)
    if kept.exists():
        return kept
    headers = folder / f"headers-{_key(found, *flags)}"
    read = headers / "metal.h.gch"
    if not read.exists():  # once for all programs: a fifth of what each takes to compile
        headers.mkdir(exist_ok=True)
        _compile([found, *flags, "-x", "c++-header", str(SHIM / "metal.h")], read)
    where = ["-I", str(headers), "-I", str(SHIM)]
    _compile([found, *flags, *where, "-x", "c++", "-"], kept, program)
    return kept


def _compile(command: list[str], kept: Path, text: str = "") -> None:
    """Runs a compiler; what it makes is there whole or not at all, whoever else makes it."""
    with tempfile.TemporaryDirectory(dir=kept.parent) as work:
        made = Path(work) / "made"
        command = [*command, "-o", str(made)]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the kernel does not compile:\n{done.stderr}")
        made.replace(kept)


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((*parts, _headers())).encode()).hexdigest()[:32]


@functools.cache
def _headers() -> str:
    return "\0".join(path.read_text() for path in sorted(SHIM.glob("*.h")))
