"""ExpertStore: where the routed experts of an unmodified checkpoint lie on disk.

Experts are stacked per projection as mlx-community writes them, `mlp.switch_mlp.gate_proj.weight`
[experts, out, in'], with scales and biases beside it when quantized. An expert is one slice of
each of these tensors. Headers are checked when the store is made; no data is read.

Refuses experts under other names or one by one, shapes that do not follow from the config, and
packings that contradict it.
"""

from specdec.checkpoint import Checkpoint
from specdec.errors import CheckpointError
from specdec.shards import TensorInfo
from specdec.target.config import TargetConfig
from specdec.target.store import PROJECTIONS, ExpertTensor, Geometry, Span, StoreFile


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
