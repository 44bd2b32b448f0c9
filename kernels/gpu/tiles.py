"""Whether products are made on matrix units (tiles.h).

It decides in which order sums are added, so it depends on nothing but the type of floats and how a
weight is kept: never on the number of rows. NVIDIA GPUs use them where they take bfloat16, from
compute capability 8.0 on; no Apple GPU has yet shown that one row is as fast with them, so Metal
does where SPECDEC_MATRIX_UNITS=1 says so.
"""

import os

import mlx.core as mx

from specdec.errors import SpecdecError
from specdec.kernels.gpu.switch import Switch

TILE_FEATURES = 16
TILE_ROWS = 8
BFLOAT16 = (8, 0)  # the least compute capability whose matrix units take it


_tiles = Switch()
use_tiles = _tiles.use  # matrix units, or none


def tiles_on() -> bool:
    """Whether they are wanted; SpecdecError if SPECDEC_MATRIX_UNITS is neither 0 nor 1, or 1 where
    the GPU has none for bfloat16."""
    if _tiles.on is None:
        wish = os.environ.get("SPECDEC_MATRIX_UNITS")
        if wish not in (None, "0", "1"):
            raise SpecdecError(f"SPECDEC_MATRIX_UNITS = {wish!r}, expected 0 or 1")
        on_cuda = mx.cuda.is_available()
        capability = _capability() if on_cuda else BFLOAT16
        if wish == "1" and capability < BFLOAT16:
            raise SpecdecError(
                f"SPECDEC_MATRIX_UNITS = '1': this GPU has compute capability "
                f"{capability[0]}.{capability[1]}, bfloat16 needs {BFLOAT16[0]}.{BFLOAT16[1]}"
            )
        _tiles.on = on_cuda and capability >= BFLOAT16 if wish is None else wish == "1"
    return _tiles.on


def _capability() -> tuple[int, int]:
    """Of the NVIDIA GPU."""
    info = mx.device_info(mx.Device(mx.gpu, 0))
    return int(info["compute_capability_major"]), int(info["compute_capability_minor"])


def tiles_for(dtype: mx.Dtype, bits: int, group_size: int, inputs: int) -> bool:
    """Whether tiles.h multiplies x of this type with rows of `inputs` weights kept so."""
    return (
        tiles_on()
        and dtype == mx.bfloat16
        and (bits == 0 or (bits in (4, 8) and group_size in (32, 64, 128)))
        and inputs % (group_size if bits else 32) == 0
    )


def groups_of(bits: int, group_size: int, inputs: int) -> int:
    """Into how many groups tiles.h divides a row of weights."""
    return inputs // (group_size if bits else 32)
