"""Checkpoint: a model folder as mlx-community writes it, read by headers and by byte ranges.

Opening a folder reads config.json, the index if there is one, and the safetensors headers; it
checks every offset against the size of its file and reads no weight. Weights are read later by
position, whole tensors with `load`, parts of them with `pread_into`.

Refuses: a folder without config.json or safetensors, an index that names absent files or tensors,
broken or truncated files, quantization modes other than affine, and shapes that contradict what the
config says about bits and group size. A leaf: imports no room.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import mlx.core as mx
import numpy as np

from specdec.errors import CheckpointError, ExpertReadError
from specdec.quantization import (
    BITS,
    GROUP_SIZES,
    Quantization,
    declared_quantization,
    parse_quantization,
)
from specdec.shards import (
    FLOATS,
    TensorInfo,
    open_shard,
    read_header,
    read_json,
    read_weight_map,
)

# dtype as in a header -> (dtype in MLX, dtype of the same width that NumPy knows)
MLX_DTYPES = {
    "BF16": (mx.bfloat16, mx.uint16),
    "F16": (mx.float16, mx.float16),
    "F32": (mx.float32, mx.float32),
    "U32": (mx.uint32, mx.uint32),
}
# Bytes of one read at most; macOS refuses more than 2 GiB.
READ_BYTES = 1 << 30


def read_at(descriptor: int, buffers: memoryview | Sequence[memoryview], offset: int) -> int:
    """One positioned read into a buffer, or into several one after the other; the number of bytes
    read (0 at the end of the file).

    Every byte of every weight passes through here.
    """
    if isinstance(buffers, memoryview):
        buffers = [buffers]
    return os.preadv(descriptor, buffers, offset)


class Checkpoint:
    """An open model folder: raw config, tensor headers, shared read-only file descriptors."""

    def __init__(
        self, folder: Path, config: dict[str, Any], shards: dict[Path, int], tensors: dict
    ) -> None:
        self.folder = folder
        self.config = config
        self.tensors: dict[str, TensorInfo] = tensors
        self._descriptors = shards
        self._quantization = declared_quantization(config, folder / "config.json")

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open a model folder and check its headers. CheckpointError on anything broken."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: not a folder")
        config = read_json(folder / "config.json")
        index = folder / "model.safetensors.index.json"
        if index.exists():
            weight_map = read_weight_map(index)
            files = [folder / name for name in sorted(set(weight_map.values()))]
        else:
            weight_map = {}
            # Not ._model.safetensors, which macOS leaves on foreign disks.
            files = sorted(folder.glob("[!.]*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder}: no *.safetensors file")
        descriptors: dict[Path, int] = {}
        try:
            tensors: dict[str, TensorInfo] = {}
            for file in files:
                descriptors[file] = open_shard(file)
                for name, info in read_header(file, descriptors[file]).items():
                    if weight_map.get(name, file.name) != file.name:
                        continue  # the index takes this name from another file
                    if name in tensors:
                        raise CheckpointError(
                            f"{file}: tensor {name} is also in {tensors[name].file.name}, "
                            "and no index says which one counts"
                        )
                    tensors[name] = info
            for name, file_name in weight_map.items():
                if name not in tensors:
                    raise CheckpointError(f"{index}: tensor {name} is not in {file_name}")
            return cls(folder, config, descriptors, tensors)
        except BaseException:
            for descriptor in descriptors.values():
                os.close(descriptor)
            raise

    def attach(self, file: Path) -> None:
        """Open another file, for `pread_into` to read from and `close` to close."""
        if file not in self._descriptors:
            self._descriptors[file] = open_shard(file)

    def close(self) -> None:
        """Close the files. Reading afterwards is an error; closing twice is not."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def descriptor(self, file: Path) -> int:
        """The open descriptor of a file; the checkpoint closes it."""
        return self._descriptors[file]

    def info(self, name: str, shape: tuple[int, ...] | None = None) -> TensorInfo:
        """The header entry of a tensor that must exist, with this shape if one is given."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        if shape is not None and info.shape != shape:
            raise CheckpointError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, expected {list(shape)}"
            )
        return info

    def floats(self, name: str, shape: tuple[int, ...] | None = None) -> TensorInfo:
        """`info` of a tensor that must hold floating-point numbers."""
        info = self.info(name, shape)
        if info.dtype not in FLOATS:
            raise CheckpointError(
                f"{info.file}: tensor {name} is {info.dtype}, expected one of {', '.join(FLOATS)}"
            )
        return info

    def quantization(self, path: str, in_features: int) -> Quantization | None:
        """How the weight of a module is packed, None when it is dense; no data is read.

        path: the module as the tensors spell it, "model.layers.0.mlp.gate" for "....gate.weight".
        in_features: inputs of the module; bits = packed columns * 32 / in_features and
            group size = in_features / scale columns follow from it.
        CheckpointError where shapes make no such packing, and where they contradict the config: its
        entry for this path, or its global values. Router and shared-expert gates without an entry
        may differ from the global values: converters keep them at 8 bits.
        """
        weight = self.info(f"{path}.weight")
        entry, declared = self._declared(path)
        if f"{path}.scales" not in self.tensors:
            if weight.dtype not in FLOATS:
                raise CheckpointError(
                    f"{weight.file}: tensor {path}.weight is {weight.dtype} but {path}.scales is "
                    f"missing; expected scales, or a dense weight in {', '.join(FLOATS)}"
                )
            if entry and declared is not None:
                raise CheckpointError(
                    f"{weight.file}: {path} is dense, but config.json quantizes it to {declared}"
                )
            return None
        found = self._packing(path, in_features)
        if entry and declared is None:
            raise CheckpointError(
                f"{weight.file}: {path} is packed with {found}, but config.json says dense"
            )
        gate = path.endswith((".gate", "_gate"))
        if declared is not None and found != declared and (entry or not gate):
            raise CheckpointError(
                f"{weight.file}: {path} is packed with {found} according to its shapes "
                f"(for {in_features} inputs), but config.json says {declared}"
            )
        return found

    def _packing(self, path: str, in_features: int) -> Quantization:
        """Bits and group size from the shapes of weight, scales and biases."""
        weight, scales = self.info(f"{path}.weight"), self.info(f"{path}.scales")
        if weight.dtype != "U32":
            raise CheckpointError(
                f"{weight.file}: tensor {path}.weight is {weight.dtype} beside scales, expected U32"
            )
        if scales.dtype not in FLOATS:
            raise CheckpointError(
                f"{scales.file}: tensor {path}.scales is {scales.dtype}, expected one of "
                f"{', '.join(FLOATS)}: only affine quantization is read"
            )
        biases = self.info(f"{path}.biases", scales.shape)
        if biases.dtype != scales.dtype:
            raise CheckpointError(
                f"{biases.file}: tensor {path}.biases is {biases.dtype}, its scales {scales.dtype}"
            )
        if len(weight.shape) < 2 or weight.shape[:-1] != scales.shape[:-1]:
            raise CheckpointError(
                f"{weight.file}: tensor {path}.weight has shape {list(weight.shape)}, "
                f"its scales {list(scales.shape)}: all but the last must agree"
            )
        packed, groups = weight.shape[-1], scales.shape[-1]
        bits, bits_left = divmod(packed * 32, in_features)
        if bits_left or bits not in BITS:
            raise CheckpointError(
                f"{weight.file}: tensor {path}.weight has {packed} packed columns for "
                f"{in_features} inputs, which is {packed * 32 / in_features:g} bits; "
                f"expected one of {BITS}"
            )
        if groups == 0 or in_features % groups or in_features // groups not in GROUP_SIZES:
            raise CheckpointError(
                f"{scales.file}: tensor {path}.scales has {groups} groups for {in_features} "
                f"inputs; expected a group size that divides them, one of {GROUP_SIZES}"
            )
        return Quantization(bits, in_features // groups)

    def _declared(self, path: str) -> tuple[bool, Quantization | None]:
        """What config.json says: (the path has its own entry, its quantization or None)."""
        where = self.folder / "config.json"
        # Converters of multimodal models write the path with or without this wrapper.
        bare = path.removeprefix("language_model.")
        for key in (path, bare, f"language_model.{bare}"):
            if key in self._quantization:
                entry = self._quantization[key]
                if not entry:
                    return True, None
                if entry is True:
                    break
                if isinstance(entry, dict):
                    return True, parse_quantization({**self._quantization, **entry}, where, key)
                raise CheckpointError(f"{where}: quantization of {key} is {entry!r}")
        if not {"bits", "group_size"} & self._quantization.keys():
            return False, None
        return False, parse_quantization(self._quantization, where, "quantization")

    def load(
        self, name: str, shape: tuple[int, ...] | None = None, dtype: mx.Dtype | None = None
    ) -> mx.array:
        """Read one tensor whole; `shape` is checked, floats are cast to `dtype` if it is given.

        A short read or an I/O error is a CheckpointError.
        """
        info = self.info(name, shape)
        if info.dtype not in MLX_DTYPES:
            raise CheckpointError(
                f"{info.file}: tensor {name} is {info.dtype}, expected one of "
                f"{', '.join(MLX_DTYPES)}"
            )
        mlx_dtype, carrier = MLX_DTYPES[info.dtype]
        array = mx.zeros(info.shape, carrier)
        mx.eval(array)
        if info.nbytes:
            # The view shares the array's memory, so the bytes are read into place.
            view = np.array(array, copy=False).reshape(-1).view(np.uint8).data
            try:
                self.pread_into(info, 0, view)
            except ExpertReadError as error:
                raise CheckpointError(str(error)) from error
        array = array.view(mlx_dtype)
        if dtype is not None and info.dtype in FLOATS:
            array = array.astype(dtype)
        mx.eval(array)
        return array

    def pread_into(self, info: TensorInfo, start: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes) from byte `start` of a tensor. ExpertReadError if it cannot."""
        assert start >= 0
        assert start + len(buffer) <= info.nbytes, (info, start, len(buffer))
        done = 0
        while done < len(buffer):
            try:
                count = read_at(
                    self._descriptors[info.file],
                    buffer[done : done + READ_BYTES],
                    info.offset + start + done,
                )
            except OSError as error:
                raise ExpertReadError(
                    f"{info.file}: reading tensor {info.name} at byte {info.offset + start + done} "
                    f"failed: {error.strerror or error}"
                ) from error
            if count <= 0:
                raise ExpertReadError(
                    f"{info.file}: short read of tensor {info.name}: {done} of {len(buffer)} bytes "
                    f"from byte {info.offset + start}; the file is truncated"
                )
            done += count
