"""ExpertStore: where every routed expert lies on disk, and how its bytes become an expert.

Experts are stacked per projection as mlx-community writes them, `mlp.switch_mlp.gate_proj.weight`
[experts, out, in'], with scales and biases beside it when quantized. An expert is one slice of
each of these tensors. Headers are checked when the store is made; data is read by position only.

Refuses experts under other names or one by one, shapes that do not follow from the config, and
packings that contradict it.
"""

import mlx.core as mx
import numpy as np

from specdec.checkpoint import Checkpoint
from specdec.errors import CheckpointError
from specdec.shards import TensorInfo
from specdec.target.config import TargetConfig
from specdec.target.store import PROJECTIONS, ExpertTensor, Geometry, Span, StoreFile

# Conversions read this much at a time when a whole layer is loaded.
STAGING_BYTES = 16 << 20


class ExpertStore:
    """The experts of all MoE layers of a checkpoint, on disk: a Store."""

    def __init__(self, checkpoint: Checkpoint, config: TargetConfig) -> None:
        """Check names, shapes and packings of every MoE layer; CheckpointError names the tensor."""
        self.checkpoint, self.config = checkpoint, config
        self.num_experts = config.num_experts
        self.layers = tuple(
            layer for layer in range(config.num_layers) if layer not in config.dense_layers
        )
        self._infos: dict[int, tuple[TensorInfo, ...]] = {}
        self._geometries: dict[int, Geometry] = {}
        for layer in self.layers:
            self._infos[layer], self._geometries[layer] = self._describe(layer)
        self._orders = {
            layer: tuple(
                sorted(range(len(infos)), key=lambda i: (str(infos[i].file), infos[i].offset))
            )
            for layer, infos in self._infos.items()
        }
        paths = {info.file for infos in self._infos.values() for info in infos}
        self.files = tuple(StoreFile(path, checkpoint.descriptor(path)) for path in sorted(paths))
        self._places = {file.path: at for at, file in enumerate(self.files)}

    def geometry(self, layer: int) -> Geometry:
        return self._geometries[layer]

    def infos(self, layer: int) -> tuple[TensorInfo, ...]:
        """The stacked tensors of a layer, in the order of its geometry's `tensors`."""
        return self._infos[layer]

    def spans(self, layer: int, expert: int) -> tuple[Span, ...]:
        """As Store says: a slice of each stacked tensor."""
        spans = []
        for info in self._infos[layer]:
            each = info.nbytes // self.num_experts
            spans.append(Span(self._places[info.file], info.offset + expert * each, each))
        return tuple(spans)

    def reading_order(self, layer: int) -> tuple[int, ...]:
        """Indexes of a layer's tensors, ascending by file and offset."""
        return self._orders[layer]

    def expert_bytes_resident(self, layer: int, dtype: mx.Dtype) -> int:
        """Bytes one slot takes, floats in `dtype`."""
        return self._geometries[layer].bytes_resident(dtype)

    def read(self, layer: int, index: int, first: int, target: np.ndarray) -> int:
        """Read consecutive experts' slices of one tensor of a layer; returns the bytes read.

        index: of the tensor in the geometry. first: the first expert.
        target: contiguous [n, *shape], uint16 standing for bfloat16, else the resident dtype.
            Bytes go straight into it when it has the dtype of the file; floats of another dtype
            are converted on the way.
        ExpertReadError on a short read or an I/O error; `target` may then be partly overwritten.
        """
        tensor, info = self._geometries[layer].tensors[index], self._infos[layer][index]
        each = tensor.bytes_on_disk
        if target.dtype == _numpy_dtype(tensor.dtype):
            view = target.reshape(-1).view(np.uint8)
            self.checkpoint.pread_into(info, first * each, view.data)
            return view.nbytes
        step = max(1, STAGING_BYTES // each)
        for start in range(0, len(target), step):
            part = target[start : start + step]
            staging = np.empty(part.shape, _numpy_dtype(tensor.dtype))
            view = staging.reshape(-1).view(np.uint8)
            self.checkpoint.pread_into(info, (first + start) * each, view.data)
            part[...] = _convert(staging, part.dtype)
        return len(target) * each

    def _describe(self, layer: int) -> tuple[tuple[TensorInfo, ...], Geometry]:
        config, checkpoint = self.config, self.checkpoint
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        sizes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
        sizes["down_proj"] = (hidden, inner)
        mlp = f"{config.prefix}layers.{layer}.mlp"
        infos: list[TensorInfo] = []
        tensors: list[ExpertTensor] = []
        quantizations = []
        for projection in PROJECTIONS:
            path = f"{mlp}.switch_mlp.{projection}"
            if f"{path}.weight" not in checkpoint.tensors:
                unstacked = any(name.startswith(f"{mlp}.experts.") for name in checkpoint.tensors)
                raise CheckpointError(
                    f"{checkpoint.folder}: tensor {path}.weight is missing"
                    + (
                        f"; layer {layer} has experts under {mlp}.experts instead, expected the "
                        "stacked layout of mlx-community (mlx_lm.convert makes it)"
                        if unstacked
                        else ""
                    )
                )
            out, into = sizes[projection]
            quantization = checkpoint.quantization(path, into)
            quantizations.append(quantization)
            shapes = {"weight": (out, into)}
            if quantization is not None:
                groups = (out, into // quantization.group_size)
                shapes = {"weight": (out, into * quantization.bits // 32)}
                shapes |= {"scales": groups, "biases": groups}
            for tensor, shape in shapes.items():
                info = checkpoint.info(f"{path}.{tensor}", (config.num_experts, *shape))
                infos.append(info)
                tensors.append(ExpertTensor(projection, tensor, shape, info.dtype))
        return tuple(infos), Geometry(tuple(tensors), tuple(quantizations))


def _numpy_dtype(dtype: str) -> np.dtype:
    """The NumPy dtype that holds a file dtype; uint16 for bfloat16, which NumPy does not know."""
    names = {"BF16": "uint16", "F16": "float16", "F32": "float32", "U32": "uint32"}
    return np.dtype(names[dtype])


def _convert(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Floats to another width, as MLX rounds (to nearest, ties to even); uint16 is bfloat16."""
    if values.dtype == np.uint16:
        wide = (values.astype(np.uint32) << 16).view(np.float32)
    else:
        wide = values.astype(np.float32)
    if dtype != np.uint16:
        return wide.astype(dtype)
    bits = wide.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(wide), 0x7FC0, rounded).astype(np.uint16)
