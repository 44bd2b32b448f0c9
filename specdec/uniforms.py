"""Random numbers by place: uniform numbers that depend on a seed and a position, on nothing else.

Philox 4x64 (Salmon et al. 2011) is a function of a key and a counter, so the number for a position
is the same whichever round, row or tree asks for it, and in whatever order.
"""

import numpy as np

TARGET, DRAWS, ACCEPT = range(3)
"""Streams: the target's choice at a position; swor's candidates after it; swor's acceptance."""


def uniforms(seed: int, position: int, count: int, stream: int) -> np.ndarray:
    """float64 [count] in the open interval (0, 1): odd multiples of 2^-54."""
    # The counter's low word counts the numbers of one place.
    philox = np.random.Philox(key=seed, counter=[0, position, stream, 0])
    return ((philox.random_raw(count) >> np.uint64(11)) + 0.5) * 2.0**-53
