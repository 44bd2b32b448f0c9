"""How experts' matrices are kept, as the kernels of experts need to know it."""

from typing import TypeAlias

import mlx.core as mx

from specdec.kernels.experts import ExpertWeights, SharedExpert
from specdec.kernels.gpu.limits import GROUPS, PACKED, Unsupported
from specdec.kernels.weight import Weight

# of a weight: shape of its data, bits, group size, dtype of its floats
Format: TypeAlias = tuple[tuple[int, ...], int, int, mx.Dtype]
Formats: TypeAlias = tuple[Format, Format, Format]  # of gate, up, down


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


def packing(formats: Formats | None, matrix: int, prefix: str) -> dict[str, int]:
    """Template arguments for gate and up (0) or down (2)."""
    _, bits, group, _ = formats[matrix] if formats else ((), 0, 0, None)
    return {f"{prefix}BITS": bits, f"{prefix}GROUP": group or 32}
