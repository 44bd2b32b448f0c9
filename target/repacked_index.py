"""RepackedIndex: what `experts.json` says of a repacked folder, and what is believed of it.

The folder is a model folder whose experts stand in one file per layer: expert after expert, each
record aligned to 16 KiB, the bytes of gate and up beside each other. The index is written last; a
folder without it that has a journal is unfinished and refused, never half used.

Refuses indexes of another kind or schema, fields of the wrong kind, places that are no permutation,
slices that overlap or leave their record, and files that are absent or of another size.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from specdec.errors import CheckpointError, RepackError
from specdec.quantization import BITS, GROUP_SIZES, Quantization
from specdec.shards import ITEM_BYTES, read_json

INDEX = "experts.json"
JOURNAL = "repack.unfinished.json"
FORMAT, SCHEMA = "specdec-experts", 1
ALIGNMENT = 16384


@dataclass(frozen=True)
class Slice:
    """One tensor of one expert: `offset` bytes into the expert's record, shape without experts."""

    projection: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class LayerFile:
    """Where a layer's experts lie: expert e from byte places[e] * stride of `file` on.

    slices: in the order of the layer's geometry (gate, up, down). stride: bytes of a record with
        its padding. quantizations: of gate, up, down; None where dense.
    """

    layer: int
    file: str
    stride: int
    places: tuple[int, ...]
    slices: tuple[Slice, ...]
    quantizations: tuple[Quantization | None, ...]

    @property
    def nbytes(self) -> int:
        return self.stride * len(self.places)


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (hexadecimal) of one file of the folder."""

    size: int
    sha256: str


@dataclass(frozen=True)
class RepackedIndex:
    """The whole index.

    source: identity of the checkpoint that was repacked (see specdec.repack.identity).
    order: what the places follow, "identity" or how they were clustered, in words.
    files: every file of the folder but the index, by name.
    """

    source: Mapping[str, Any]
    order: str
    layers: tuple[LayerFile, ...]
    files: Mapping[str, FileEntry]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read and check the index of a folder, and the sizes of the files with tensors; no data
        is read. CheckpointError says what is wrong."""
        path = folder / INDEX
        raw = read_json(path)
        if raw.get("format") != FORMAT or raw.get("schema") != SCHEMA:
            raise CheckpointError(
                f"{path}: format {raw.get('format')!r}, schema {raw.get('schema')!r}; expected "
                f"{FORMAT!r}, schema {SCHEMA}"
            )
        try:
            files = {
                str(name): FileEntry(int(entry["size"]), str(entry["sha256"]))
                for name, entry in raw["files"].items()
            }
            layers = tuple(_layer(entry) for entry in raw["layers"])
            index = cls(dict(raw["source"]), str(raw["order"]), layers, files)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: broken: {error!r}") from error
        index._check(folder)
        return index

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "alignment": ALIGNMENT,
            "source": dict(self.source),
            "order": self.order,
            "layers": [_layer_json(layer) for layer in self.layers],
            "files": {
                name: {"size": entry.size, "sha256": entry.sha256}
                for name, entry in self.files.items()
            },
        }

    def _check(self, folder: Path) -> None:
        path = folder / INDEX
        for name, entry in self.files.items():
            if Path(name).name != name:
                raise CheckpointError(f"{path}: names {name!r}, expected a plain file name")
            if not name.endswith((".bin", ".safetensors")):
                continue  # a config may be edited; `specdec inspect` tells
            try:
                size = (folder / name).stat().st_size
            except OSError as error:
                raise CheckpointError(f"{path}: {name} is missing: {error.strerror}") from error
            if size != entry.size:
                raise CheckpointError(
                    f"{folder / name}: {size} bytes, expected {entry.size} as {INDEX} says"
                )
        for layer in self.layers:
            entry = self.files.get(layer.file, FileEntry(-1, ""))
            where = f"{path}: layer {layer.layer}"
            if entry.size != layer.nbytes:
                raise CheckpointError(
                    f"{where}: {len(layer.places)} records of {layer.stride} bytes in "
                    f"{layer.file} of {entry.size}"
                )
            if layer.stride <= 0 or layer.stride % ALIGNMENT:
                raise CheckpointError(
                    f"{where}: records of {layer.stride} bytes, expected a multiple of {ALIGNMENT}"
                )
            if sorted(layer.places) != list(range(len(layer.places))):
                raise CheckpointError(f"{where}: its places are no permutation")
            spans = sorted((one.offset, one.offset + one.nbytes) for one in layer.slices)
            inside = spans and spans[0][0] >= 0 and spans[-1][1] <= layer.stride
            if not inside or any(end > start for (_, end), (start, _) in pairwise(spans)):
                raise CheckpointError(f"{where}: slices overlap or leave their record")


def is_repacked(folder: Path) -> bool:
    """Whether a folder holds repacked experts. RepackError where their repacking never ended."""
    if (folder / INDEX).exists():
        return True
    if (folder / JOURNAL).exists():
        raise RepackError(
            f"{folder}: an unfinished repack ({JOURNAL} without {INDEX}): run the same "
            "`specdec repack` again to finish it"
        )
    return False


def _layer(raw: Mapping[str, Any]) -> LayerFile:
    slices = tuple(
        Slice(
            str(one["projection"]),
            str(one["tensor"]),
            _dtype(one["dtype"]),
            tuple(_count(size) for size in one["shape"]),
            _count(one["offset"]),
        )
        for one in raw["tensors"]
    )
    quantizations = tuple(
        None if one is None else _quantization(one["bits"], one["group_size"])
        for one in raw["quantization"]
    )
    places = tuple(_count(place) for place in raw["places"])
    stride, layer = _count(raw["stride"]), _count(raw["layer"])
    return LayerFile(layer, str(raw["file"]), stride, places, slices, quantizations)


def _layer_json(layer: LayerFile) -> dict[str, Any]:
    return {
        "layer": layer.layer,
        "file": layer.file,
        "stride": layer.stride,
        "quantization": [
            None if one is None else {"bits": one.bits, "group_size": one.group_size}
            for one in layer.quantizations
        ],
        "tensors": [
            {
                "projection": one.projection,
                "tensor": one.tensor,
                "dtype": one.dtype,
                "shape": list(one.shape),
                "offset": one.offset,
            }
            for one in layer.slices
        ],
        "places": list(layer.places),
    }


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} where a count belongs")
    return value


def _quantization(bits: Any, group_size: Any) -> Quantization:
    if bits not in BITS or group_size not in GROUP_SIZES:
        raise ValueError(f"quantization {bits!r} bits, group size {group_size!r}")
    return Quantization(bits, group_size)


def _dtype(value: Any) -> str:
    if value not in ITEM_BYTES:
        raise ValueError(f"dtype {value!r}")
    return str(value)


def encode(document: Mapping[str, Any]) -> bytes:
    """A document as its file has it."""
    return (json.dumps(document, indent=1) + "\n").encode()
