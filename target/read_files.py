"""ReadFiles: a store's files as its readers use them, through the system's page cache or past it.

`direct` reads go past it: O_DIRECT on Linux, F_NOCACHE on macOS. Refused where the file system
cannot do that, and for a file that is no longer the one whose header was read.
"""

import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from specdec.errors import CheckpointError, ExpertReadError
from specdec.target.store import StoreFile

# What O_DIRECT wants offsets, lengths and memory to be multiples of.
ALIGNMENT = 4096


class ReadFiles:
    """descriptors: per file, what to read from. alignment: of offsets and lengths of reads."""

    def __init__(self, files: Sequence[StoreFile], direct: bool) -> None:
        """CheckpointError where direct reads are asked for and cannot be had."""
        self._files = files
        self._opened = [_identity(file.descriptor) for file in files]
        self._own: list[int] = []
        self.descriptors = [file.descriptor for file in files]
        self.alignment = 1
        if direct:
            try:
                self._open_direct()
            except CheckpointError:
                self.close()
                raise

    def path(self, file: int) -> Path:
        return self._files[file].path

    def check_unchanged(self, file: int) -> None:
        """ExpertReadError when a file's content has been changed since it was opened."""
        before, now = self._opened[file], _identity(self._files[file].descriptor)
        if now != before:
            raise ExpertReadError(
                f"{self.path(file)}: was changed while it was open: {before[2]} bytes before, "
                f"{now[2]} now"
            )

    def way_out(self, error: OSError) -> str:
        """What to say beside a failed read: some file systems take O_DIRECT, not the reads."""
        return "; use --io buffered" if self._own and error.errno == errno.EINVAL else ""

    def close(self) -> None:
        """Close what was opened here."""
        while self._own:
            os.close(self._own.pop())

    def _open_direct(self) -> None:
        flag = getattr(os, "O_DIRECT", 0)
        nocache = getattr(fcntl, "F_NOCACHE", None)
        if not flag and nocache is None:
            raise CheckpointError("--io direct: this system has no reads past its page cache")
        for file, opened in zip(self._files, self._opened, strict=True):
            try:
                self._own.append(os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | flag))
                if nocache is not None:
                    fcntl.fcntl(self._own[-1], nocache, 1)
            except OSError as error:
                raise CheckpointError(
                    f"{file.path}: --io direct is refused: {error.strerror}; use --io buffered"
                ) from error
            if _identity(self._own[-1]) != opened:
                raise CheckpointError(f"{file.path}: was replaced or changed while it was open")
        self.descriptors = list(self._own)
        self.alignment = ALIGNMENT if flag else 1


def _identity(descriptor: int) -> tuple[int, int, int, int]:
    """What tells a file from another, and from itself after a change: device, inode, bytes, and
    time of the last change in nanoseconds."""
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
