"""Quantization: bits and group size of a packed weight, and what a config declares about them.

Refuses every mode but MLX's affine one. A leaf: imports no room.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.errors import CheckpointError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Quantization:
    """As MLX packs it: w = scale * q + bias, one scale and bias per `group_size` inputs."""

    bits: int
    group_size: int

    def __post_init__(self) -> None:
        assert self.bits in BITS
        assert self.group_size in GROUP_SIZES

    def __str__(self) -> str:
        return f"{self.bits} bits, group size {self.group_size}"


def declared_quantization(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """The quantization object of a config: global values and entries per path; empty if none."""
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization", "quantization_config"):
            declared = holder.get(key)
            if declared is None:
                continue
            if not isinstance(declared, dict):
                raise CheckpointError(f"{where}: {key} is {declared!r}, expected an object")
            if "quant_method" in declared:
                raise CheckpointError(
                    f"{where}: {key} has quant_method {declared['quant_method']!r}; "
                    "expected affine quantization as MLX writes it"
                )
            if "bits" in declared or "group_size" in declared:
                parse_quantization(declared, where, key)
            return declared
    return {}


def parse_quantization(declared: dict[str, Any], where: Path, key: str) -> Quantization:
    bits, group_size = declared.get("bits"), declared.get("group_size")
    mode = declared.get("mode", "affine")
    if mode != "affine":
        raise CheckpointError(f"{where}: {key} has mode {mode!r}, expected 'affine'")
    whole = type(bits) is int and type(group_size) is int
    if not whole or bits not in BITS or group_size not in GROUP_SIZES:
        raise CheckpointError(
            f"{where}: {key} has bits {bits!r} and group_size {group_size!r}, "
            f"expected bits in {BITS} and group_size in {GROUP_SIZES}"
        )
    return Quantization(bits, group_size)
