"""What the commands say of a repacked folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from specdec.commands.console import Console
from specdec.errors import RepackError
from specdec.units import size

if TYPE_CHECKING:
    from specdec.target.repacked_index import RepackedIndex


def check(folder: Path, hashes: bool) -> "tuple[RepackedIndex | None, list[tuple[str, str]]]":
    """The index of a folder, checked, and (subject, words) rows about it; nothing where the
    experts lie in the checkpoint's own files. RepackError if those were to be verified."""
    from specdec.repack_check import verify
    from specdec.target.repacked_index import is_repacked

    if not is_repacked(folder):
        if hashes:
            raise RepackError(f"{folder}: --verify: is no repacked folder and has no hashes")
        return None, []
    index, done = verify(folder, hashes, Console(quiet=False).progress("verifying:"))
    records = " or ".join(size(one) for one in sorted({layer.stride for layer in index.layers}))
    checked = "their sizes are right; --verify reads them"
    if hashes:
        checked = f"{size(done)} as their hashes say"
    return index, [
        ("repacked", f"from {index.source['model']}, order of experts: {index.order}"),
        ("", f"{len(index.layers)} layer files, {records} for each expert, aligned to 16 KiB"),
        ("", f"{len(index.files)} files, {checked}"),
    ]
