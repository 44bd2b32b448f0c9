"""Included: texts of kernels as files, for CUDA.

MLX hashes the whole text of a kernel at each of its launches, which for our texts takes half as
long as all else it does to begin one. The text of an include is short. Its file is named by a hash
of what it holds, so MLX, which keeps what it compiled by its text, keeps the right thing.
"""

import hashlib
import os
import sys
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4


def included(text: str) -> str:
    """What stands for the text in a kernel: the include of a file, or the text where no file can
    be written."""
    folder = cache_folder()
    if folder is None:
        return text
    data = text.encode()
    file = folder / f"specdec-{hashlib.sha256(data).hexdigest()[:32]}.h"
    try:
        if not (file.is_file() and file.read_bytes() == data):
            folder.mkdir(parents=True, exist_ok=True)
            put(file, data)
    except OSError as why:
        _say(folder, why.strerror)
        return text
    return f'#include "{file}"\n'


def put(file: Path, data: bytes) -> None:
    """As a whole or not at all."""
    # not by the process's number: containers that share the folder have the same
    part = file.with_name(f"{uuid4().hex}.part")
    try:
        part.write_bytes(data)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


@cache
def cache_folder() -> Path | None:
    """Beside what MLX compiled, which lives as long; None where there can be none."""
    told = os.environ.get("MLX_PTX_CACHE_DIR")
    folder = Path(told or Path(tempfile.gettempdir()) / "mlx" / version("mlx") / "ptx").absolute()
    if not str(folder).isprintable() or set('"\\') & set(str(folder)):
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as why:
        _say(folder, why.strerror)
        return None
    return folder


@cache
def _say(folder: Path, why: str | None) -> None:
    print(
        f"kernel texts cannot be kept as files in {folder} ({why}): launches begin slower",
        file=sys.stderr,
    )
