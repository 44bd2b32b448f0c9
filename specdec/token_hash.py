"""The hash by which token sequences are compared across runs, files and engines."""

import hashlib
from collections.abc import Sequence

import numpy as np


def token_sha256(tokens: Sequence[int]) -> str:
    """SHA-256 of the tokens as little-endian int32, in hexadecimal."""
    return hashlib.sha256(np.array(tokens, "<i4").tobytes()).hexdigest()
