"""RepackPlan: what a repack will write, worked out from headers alone.

A plan says what the checkpoint is known by, in which records its experts will lie, and which files
stand beside them. Two runs with equal plans make equal folders.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from specdec.checkpoint import Checkpoint
from specdec.durable import sha256_of
from specdec.errors import RepackError
from specdec.shards import TensorInfo
from specdec.target.expert_store import ExpertStore
from specdec.target.repacked_index import ALIGNMENT, INDEX, JOURNAL, LayerFile, RepackedIndex, Slice

SHARD_INDEX = "model.safetensors.index.json"
EXPERT_MARK = ".mlp.switch_mlp."


@dataclass(frozen=True)
class RepackPlan:
    """source: the identity of the checkpoint. order: of the experts, in words.

    dense: the tensors that are no experts. small: the files beside the tensors.
    """

    source: Mapping[str, Any]
    order: str
    layers: tuple[LayerFile, ...]
    dense: tuple[TensorInfo, ...]
    small: tuple[Path, ...]

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        store: ExpertStore,
        places: Mapping[int, Sequence[int]] | None = None,
        order: str = "identity",
    ) -> Self:
        """places: expert -> place per layer; None for the order of the ids."""
        dense = (info for name, info in checkpoint.tensors.items() if EXPERT_MARK not in name)
        return cls(
            identity(checkpoint),
            order,
            tuple(_layer_file(store, layer, places) for layer in store.layers),
            tuple(dense),
            _small_files(checkpoint.folder),
        )

    @property
    def dense_bytes(self) -> int:
        return sum(info.nbytes for info in self.dense)

    @property
    def nbytes(self) -> int:
        """Bytes of experts and other tensors, as progress counts them."""
        return self.dense_bytes + sum(layer.nbytes for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """The index but its files."""
        document = RepackedIndex(self.source, self.order, self.layers, {}).to_json()
        del document["files"]
        return document


def identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint is known by: its name, its config's hash, sizes and header hashes of its
    files, and when they were last changed."""
    paths = sorted({info.file for info in checkpoint.tensors.values()})
    try:
        files = [_file_identity(path) for path in paths]
    except OSError as error:
        raise RepackError(f"{checkpoint.folder}: reading failed: {error}") from error
    config = sha256_of(checkpoint.folder / "config.json", RepackError)
    return {"model": checkpoint.folder.resolve().name, "config_sha256": config, "files": files}


def _layer_file(
    store: ExpertStore, layer: int, places: Mapping[int, Sequence[int]] | None
) -> LayerFile:
    """The records of a layer: gate and up beside each other, tensor by tensor, then down."""
    geometry, offset, offsets = store.geometry(layer), 0, {}
    kinds = list(dict.fromkeys(one.tensor for one in geometry.tensors))
    order = sorted(
        geometry.tensors, key=lambda one: (one.projection == "down_proj", kinds.index(one.tensor))
    )
    for one in order:
        offsets[one.projection, one.tensor] = offset
        offset += one.bytes_on_disk
    experts = range(store.num_experts) if places is None else places[layer]
    return LayerFile(
        layer=layer,
        file=f"experts-{layer:05d}.bin",
        stride=-(-offset // ALIGNMENT) * ALIGNMENT,
        places=tuple(int(place) for place in experts),
        slices=tuple(
            Slice(
                one.projection,
                one.tensor,
                one.dtype,
                one.shape,
                offsets[one.projection, one.tensor],
            )
            for one in geometry.tensors
        ),
        quantizations=geometry.quantizations,
    )


def _small_files(folder: Path) -> tuple[Path, ...]:
    """What stands beside the tensors: config, tokenizer, templates, notes."""
    return tuple(
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.name[0] != "."
        and path.suffix != ".safetensors"
        and path.name not in (SHARD_INDEX, INDEX, JOURNAL)
    )


def _file_identity(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    return {
        "name": path.name,
        "size": path.stat().st_size,
        "modified_ns": path.stat().st_mtime_ns,
        "header_sha256": hashlib.sha256(length + header).hexdigest(),
    }
