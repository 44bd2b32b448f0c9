"""Checking a repacked folder against its index."""

from collections.abc import Callable
from pathlib import Path

from specdec.durable import sha256_of
from specdec.errors import RepackError
from specdec.target.repacked_index import RepackedIndex


def verify(
    folder: Path, hashes: bool, on_progress: Callable[[int, int], None] | None = None
) -> tuple[RepackedIndex, int]:
    """Check a repacked folder against its index: sizes, and with `hashes` every byte.

    Returns the index and the bytes that were hashed. CheckpointError or RepackError names the file.
    """
    index = RepackedIndex.read(folder)
    for name, entry in index.files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError as error:
            raise RepackError(f"{folder / name}: is missing: {error.strerror}") from error
        if found != entry.size:
            raise RepackError(f"{folder / name}: {found} bytes, expected {entry.size}")
    if not hashes:
        return index, 0
    done, total = 0, sum(entry.size for entry in index.files.values())

    def step(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total)

    for name, entry in index.files.items():
        digest = sha256_of(folder / name, RepackError, step)
        if digest != entry.sha256:
            raise RepackError(
                f"{folder / name}: content has sha256 {digest}, expected {entry.sha256}: the file "
                "is damaged"
            )
    return index, done
