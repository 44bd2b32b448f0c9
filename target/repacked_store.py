"""RepackedStore: the experts of a folder that `specdec repack` wrote, as ExpertStore gives them.

Each expert is one aligned record of its layer's file, gate and up beside each other. Refuses an
index that contradicts the config: other layers, another number of experts, other shapes or
packings.
"""

from specdec.checkpoint import Checkpoint
from specdec.errors import CheckpointError
from specdec.shards import FLOATS, TensorInfo
from specdec.target.config import TargetConfig
from specdec.target.expert_store import ExpertStore
from specdec.target.repacked_index import INDEX, LayerFile, RepackedIndex, is_repacked
from specdec.target.store import PROJECTIONS, ExpertTensor, Geometry, Span


class RepackedStore(ExpertStore):
    """The experts of all MoE layers of a repacked folder, on disk."""

    def __init__(self, checkpoint: Checkpoint, config: TargetConfig) -> None:
        """Check the index against the config and open the layers' files, which the checkpoint
        closes; CheckpointError names the layer and the tensor."""
        self.index = RepackedIndex.read(checkpoint.folder)
        self._files = {layer.layer: layer for layer in self.index.layers}
        super().__init__(checkpoint, config)
        if tuple(self._files) != self.layers:
            raise CheckpointError(
                f"{checkpoint.folder / INDEX}: layers {list(self._files)}, but config.json has "
                f"experts in {list(self.layers)}"
            )

    def spans(self, layer: int, expert: int) -> tuple[Span, ...]:
        """As Store says: slices of one record."""
        file = self._files[layer]
        at, record = self._places[self._infos[layer][0].file], file.places[expert] * file.stride
        return tuple(Span(at, record + one.offset, one.nbytes) for one in file.slices)

    def _describe(self, layer: int) -> tuple[tuple[TensorInfo, ...], Geometry]:
        file = self._files.get(layer)
        path = self.checkpoint.folder / INDEX
        if file is None:
            raise CheckpointError(f"{path}: layer {layer} is missing")
        if len(file.places) != self.num_experts:
            raise CheckpointError(
                f"{path}: layer {layer} has {len(file.places)} experts, config.json says "
                f"{self.num_experts}"
            )
        self._check_shapes(file)
        at = self.checkpoint.folder / file.file
        self.checkpoint.attach(at)
        infos = tuple(
            TensorInfo(
                f"layers.{layer} {one.projection}.{one.tensor}",
                at,
                one.dtype,
                (self.num_experts, *one.shape),
                one.offset,
                self.num_experts * one.nbytes,
            )
            for one in file.slices
        )
        tensors = (ExpertTensor(s.projection, s.tensor, s.shape, s.dtype) for s in file.slices)
        return infos, Geometry(tuple(tensors), file.quantizations)

    def _check_shapes(self, file: LayerFile) -> None:
        """The slices are those of gate, up and down as config and packing have them."""
        hidden, inner = self.config.hidden_size, self.config.moe_intermediate_size
        expected: list[tuple[str, str, tuple[int, ...], bool]] = []
        for projection, packing in zip(PROJECTIONS, file.quantizations, strict=True):
            out, into = (hidden, inner) if projection == "down_proj" else (inner, hidden)
            if packing is None:
                expected.append((projection, "weight", (out, into), False))
                continue
            columns, groups = into * packing.bits // 32, (out, into // packing.group_size)
            expected.append((projection, "weight", (out, columns), True))
            expected += [(projection, name, groups, False) for name in ("scales", "biases")]
        found = [(one.projection, one.tensor, one.shape, one.dtype == "U32") for one in file.slices]
        if found != expected or any(one.dtype not in (*FLOATS, "U32") for one in file.slices):
            words = (f"{s.projection}.{s.tensor} {s.dtype} {list(s.shape)}" for s in file.slices)
            raise CheckpointError(
                f"{self.checkpoint.folder / INDEX}: layer {file.layer} has {', '.join(words)}; "
                f"config.json and its packing make it {_words(expected)}"
            )


def open_store(checkpoint: Checkpoint, config: TargetConfig) -> ExpertStore:
    """The store of a model folder: of its repacked experts where it has an index of them."""
    kind = RepackedStore if is_repacked(checkpoint.folder) else ExpertStore
    return kind(checkpoint, config)


def _words(expected: list[tuple[str, str, tuple[int, ...], bool]]) -> str:
    return ", ".join(
        f"{projection}.{tensor} {'U32' if packed else 'floats'} {list(shape)}"
        for projection, tensor, shape, packed in expected
    )
