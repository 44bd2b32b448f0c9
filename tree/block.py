"""Block: what a draft proposes for the next positions, as the tree builder takes it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Block:
    """The most probable tokens of every slot of one draft pass.

    Slot 0 is the position after the bonus token. The slots' distributions are independent of each
    other: each was drafted without knowing what the others hold.

    tokens: int32 [slots, width], distinct within a slot, most probable first (ties: lower id).
    log_probs: float64 [slots, width], natural logarithm of each token's probability in its slot's
        full distribution; at most 0, -inf allowed, never NaN.
    """

    tokens: np.ndarray
    log_probs: np.ndarray

    def __post_init__(self) -> None:
        assert self.tokens.ndim == 2
        assert self.tokens.shape == self.log_probs.shape
        assert self.width >= 1
        assert (self.log_probs <= 0.0).all()  # false for NaN as well
        assert (self.log_probs[:, 1:] <= self.log_probs[:, :-1]).all()
        assert (np.diff(np.sort(self.tokens, axis=1), axis=1) > 0).all()

    @property
    def slots(self) -> int:
        """Positions drafted: the block size less one."""
        return self.tokens.shape[0]

    @property
    def width(self) -> int:
        """Candidates per slot."""
        return self.tokens.shape[1]
