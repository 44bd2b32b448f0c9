"""Shards: the safetensors files of a model folder and where each tensor lies in them.

Reads JSON and headers only. Refuses unreadable, broken and truncated files, dtypes it does not
know, offsets that contradict shapes, and an index that leads to absent files or out of the folder.
A leaf: imports no room.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.errors import CheckpointError

# The dtypes of dense weights, scales and biases.
FLOATS = ("BF16", "F16", "F32")

# dtype as in a safetensors header -> bytes per element
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("BF16", "F16", "U16", "I16"), 2),
    **dict.fromkeys(("F32", "U32", "I32"), 4),
    **dict.fromkeys(("F64", "U64", "I64", "C64"), 8),
}
# A header of a real shard is below 1 MB; the format itself stops at 100 MB.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes from the absolute `offset` of `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def __post_init__(self) -> None:
        assert self.nbytes == math.prod(self.shape) * ITEM_BYTES[self.dtype]


def open_shard(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be opened: {error.strerror}") from error


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds a {type(content).__name__}, expected an object")
    return content


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of a sharded checkpoint."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing or empty")
    for name, file in weight_map.items():
        # Only files of this folder: an index is downloaded data and must not lead elsewhere.
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: {name} lies in {file!r}, expected a plain file name")
    for file in sorted(set(weight_map.values())):
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index}: names {file}, which is not in {index.parent}")
    return weight_map


def read_header(file: Path, descriptor: int) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, checked against its size.

    Format: 8 bytes little-endian header length, the header as JSON, then the data; data_offsets
    count from the end of the header (https://github.com/huggingface/safetensors).
    """
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{file}: {size} bytes with a header of {length}: not a safetensors file, or truncated"
        )
    try:
        header = json.loads(os.pread(descriptor, length, 8))
        header.pop("__metadata__", None)
        entries = [
            (str(name), str(entry["dtype"]), *_extents(entry["shape"], entry["data_offsets"]))
            for name, entry in header.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: the safetensors header is broken: {error!r}") from error
    tensors = {}
    for name, dtype, shape, (begin, end) in entries:
        if dtype not in ITEM_BYTES:
            raise CheckpointError(f"{file}: tensor {name} has unknown dtype {dtype}")
        nbytes = math.prod(shape) * ITEM_BYTES[dtype]
        if end - begin != nbytes:
            raise CheckpointError(
                f"{file}: tensor {name}, {dtype} {list(shape)}, takes {nbytes} bytes, "
                f"but its offsets are {begin} and {end}"
            )
        if 8 + length + end > size:
            raise CheckpointError(
                f"{file}: truncated: tensor {name} ends at byte {8 + length + end}, "
                f"the file has {size}"
            )
        tensors[name] = TensorInfo(name, file, dtype, shape, 8 + length + begin, nbytes)
    return tensors


def _extents(shape: list[int], offsets: list[int]) -> tuple[tuple[int, ...], tuple[int, int]]:
    begin, end = offsets
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"shape {shape}, data_offsets {offsets}")
    return tuple(shape), (begin, end)
