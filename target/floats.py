"""Floats on their way from a file to a bank: the dtypes, and conversion as MLX rounds."""

import numpy as np

# File dtype -> the NumPy dtype that holds it; uint16 for bfloat16, which NumPy does not know.
HOLDERS: dict[str, np.dtype] = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "U32": np.dtype(np.uint32),
}
# Elements converted at a time: what lies between the two dtypes stays in the processor's cache.
_BLOCK = 16384


def convert(values: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` with floats of another dtype, rounded to nearest, ties to even.

    Both flat and of one length; uint16 is bfloat16.
    """
    for start in range(0, len(values), _BLOCK):
        part = values[start : start + _BLOCK]
        if part.dtype == np.uint16 and out.dtype == np.float32:
            bits = out[start : start + _BLOCK].view(np.uint32)
            bits[...] = part
            bits <<= 16
            continue
        if part.dtype == np.uint16:
            wide = (part.astype(np.uint32) << 16).view(np.float32)
        else:
            wide = part.astype(np.float32)
        if out.dtype == np.uint16:
            bits = wide.view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            out[start : start + _BLOCK] = np.where(np.isnan(wide), 0x7FC0, rounded)
        else:
            out[start : start + _BLOCK] = wide
