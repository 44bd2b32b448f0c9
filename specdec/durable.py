"""DurableFile: a file that appears whole, hashed and on the disk, or not at all.

Bytes go to a draft beside the place; `keep` flushes it to the disk and renames it. What fails on
the way (a full disk, an I/O error) is a SpecdecError that names the file, and the draft is gone.
A leaf: imports no room.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from specdec.errors import SpecdecError

# Hashing and copying go in pieces of this many bytes.
PIECE_BYTES = 8 << 20


def write_some(descriptor: int, data: memoryview) -> int:
    """One write; the number of bytes written. Every byte of a durable file passes through here."""
    return os.write(descriptor, data)


class DurableFile:
    """A file to be, as a context manager: `write` in order, then `keep` once.

    error: the kind of SpecdecError raised when the disk fails.
    nbytes, sha256: of what was written so far; sha256 in hexadecimal.
    """

    def __init__(self, path: Path, error: type[SpecdecError] = SpecdecError) -> None:
        self.path, self.nbytes = path, 0
        self._error, self._hash = error, hashlib.sha256()
        self._draft = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._descriptor = -1

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
        try:
            self._descriptor = os.open(self._draft, flags, 0o644)
        except OSError as error:
            raise self._failed(error) from error
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        while view:
            try:
                count = write_some(self._descriptor, view)
            except OSError as error:
                raise self._failed(error) from error
            if count <= 0:
                raise self._error(f"{self.path}: nothing more could be written at {self.nbytes}")
            self.nbytes += count
            view = view[count:]

    def keep(self) -> None:
        """Flush to the disk and put in place; an older file of that name is replaced."""
        try:
            os.fsync(self._descriptor)
            os.replace(self._draft, self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise self._failed(error) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._draft.unlink(missing_ok=True)

    def _failed(self, error: OSError) -> SpecdecError:
        return self._error(f"{self.path}: writing failed: {error.strerror or error}")


def write_durably(path: Path, data: bytes, error: type[SpecdecError] = SpecdecError) -> None:
    """A whole small file at once."""
    with DurableFile(path, error) as file:
        file.write(data)
        file.keep()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder as durable as the files they stand for."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(
    path: Path,
    error: type[SpecdecError] = SpecdecError,
    on_bytes: Callable[[int], None] | None = None,
) -> str:
    """SHA-256 of a file's content in hexadecimal; on_bytes gets the bytes of each piece read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
                if on_bytes is not None:
                    on_bytes(len(piece))
    except OSError as failure:
        raise error(f"{path}: reading failed: {failure.strerror or failure}") from failure
    return digest.hexdigest()
