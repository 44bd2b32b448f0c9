"""What the kernels of experts are to compute, and how the matrices are kept."""

from dataclasses import dataclass
from typing import TypeAlias

import mlx.core as mx

from specdec.kernels.experts import ExpertWeights, SharedExpert
from specdec.kernels.gpu.limits import GROUPS, PACKED, Unsupported
from specdec.kernels.weight import Weight

# of a weight: shape of its data, bits, group size, dtype of its floats
Format: TypeAlias = tuple[tuple[int, ...], int, int, mx.Dtype]
Formats: TypeAlias = tuple[Format, Format, Format]  # of gate, up, down

UNUSED = (8,)  # shape of an output that is not written; kernels load from arrays of 8 elements


def _matrix(name: str) -> tuple[str, str, str]:
    return name, f"{name}_scales", f"{name}_biases"


# of both kernels of each operation, of the first behind what it reads of x
HIDDEN_INPUTS = (
    *(*_matrix("gate"), *_matrix("up")),
    *(*_matrix("shared_gate"), *_matrix("shared_up")),
    *("used", "experts", "table"),
)
SUM_INPUTS = (
    *("x", "hidden", "shared_hidden"),
    *(*_matrix("down"), *_matrix("shared_down")),
    *("used", "experts", "table", "factors", "gate", "apart"),
)
PACKING = ("BITS", "GROUP", "INNER", "SHARED_BITS", "SHARED_GROUP", "SHARED_INNER")


def arrays_of(
    matrices: ExpertWeights | SharedExpert,
) -> list[tuple[mx.array, mx.array, mx.array]]:
    """Data, scales and biases of gate, up and down."""
    return [
        (w.data, w.data, w.data) if w.scales is None else (w.data, w.scales, w.biases)
        for w in (matrices.gate, matrices.up, matrices.down)
    ]


def formats_of(matrices: ExpertWeights | SharedExpert) -> Formats:
    gate, up, down = matrices.gate, matrices.up, matrices.down
    return _format_of(gate), _format_of(up), _format_of(down)


def _format_of(weight: Weight) -> Format:
    data, scales = weight.data, weight.scales
    floats = data if scales is None else scales
    return data.shape, weight.bits, weight.group_size, floats.dtype


def inner_of(formats: Formats | None, dtype: mx.Dtype, hidden: int, name: str) -> int:
    """Intermediate features, of 8 where there are no experts; Unsupported for what is not taken."""
    if formats is None:
        return 8
    gate, up, down = formats
    if gate != up:
        raise Unsupported(f"kernel expert_hidden: {name}: up kept as {up}, expected {gate} as gate")
    inner = gate[0][-2]
    expected = {"gate": (inner, hidden), "down": (hidden, inner)}
    for matrix, (shape, bits, group, floats) in (("gate", gate), ("down", down)):
        found = f"kernel expert_hidden: {name}: {matrix}"
        if floats != dtype:
            raise Unsupported(f"{found} of {floats}, expected {dtype} as x")
        if bits and (bits not in PACKED or group not in GROUPS):
            raise Unsupported(
                f"{found} of {bits} bits in groups of {group}, "
                "expected 2, 3, 4, 5, 6 or 8 in groups of 32, 64 or 128"
            )
        features = shape[-1] * 32 // bits if bits else shape[-1]
        if (shape[-2], features) != expected[matrix] or features % 8:
            raise Unsupported(
                f"{found} {(shape[-2], features)}, expected {expected[matrix]}, multiples of 8"
            )
    return inner


@dataclass(frozen=True)
class Task:
    """What two launches compute, on any kernels.

    hidden: features of x. used: entries of the union. bank, shared: None where that expert is not
    computed. gate: column of the shared expert's gate. apart: outputs are not added up.
    """

    rows: int
    hidden: int
    dtype: mx.Dtype
    top_k: int
    used: int
    bank: Formats | None
    shared: Formats | None
    inner: int
    shared_inner: int
    gate: int
    apart: bool

    @property
    def most(self) -> int:
        """The next power of 2 of the rows."""
        return 1 << (self.rows - 1).bit_length()

    def entries(self, rows: int) -> int:
        """What is computed one after the other; the shared expert for so many rows at once."""
        alone = 0 if self.shared is None else -(-self.rows // rows)
        return alone + (0 if self.bank is None else self.used)

    def template(self, matrix: int) -> dict[str, int | bool | mx.Dtype]:
        """Arguments that all kernels have, for gate and up (0) or down (2)."""
        return {
            "T": self.dtype,
            **packing(self.bank, matrix, ""),
            **packing(self.shared, matrix, "SHARED_"),
            "INNER": self.inner,
            "SHARED_INNER": self.shared_inner,
            "TOP_K": self.top_k,
            "ROUTED": self.bank is not None,
            "WITH_SHARED": self.shared is not None,
        }

    def sum_template(self) -> dict[str, int | bool | mx.Dtype]:
        """Arguments of both kernels that add up."""
        return {
            **self.template(2),
            "O": self.out_dtype,
            "MOST": self.most,
            "GATE": self.gate,
            "APART": self.apart,
        }

    @property
    def hidden_shapes(self) -> list[tuple[int, ...]]:
        """Of what stands between the matrices: of the routed experts, of the shared one."""
        return [
            UNUSED if self.bank is None else (self.rows * self.top_k, self.inner),
            UNUSED if self.shared is None else (self.rows, self.shared_inner),
        ]

    @property
    def out_shape(self) -> tuple[int, ...]:
        middle = (self.top_k,) if self.apart else ()
        return self.rows, *middle, self.hidden

    @property
    def out_dtype(self) -> mx.Dtype:
        return mx.float32 if self.apart else self.dtype


def packing(formats: Formats | None, matrix: int, prefix: str) -> dict[str, int]:
    """Template arguments for gate and up (0) or down (2)."""
    _, bits, group, _ = formats[matrix] if formats else ((), 0, 0, None)
    return {f"{prefix}BITS": bits, f"{prefix}GROUP": group or 32}
