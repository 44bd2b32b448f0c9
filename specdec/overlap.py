"""Overlap: what plain decoding gains where each round gives a GPU the next round's pass ahead."""

from collections import deque
from statistics import median_low

from specdec.round import Round

ROUNDS = 9  # whose median counts
ENOUGH = 3  # until when one round that was kept from its work may be half of what is known


class Overlap:
    """Learned of one machine and target, from round to round of plain decoding."""

    def __init__(self) -> None:
        self._shares: deque[float] = deque(maxlen=ROUNDS)

    @property
    def known(self) -> bool:
        return len(self._shares) >= ENOUGH

    @property
    def share(self) -> float:
        """Of the time of a lone pass and its commit, what a round takes among others: 1 while
        nothing is known, and never more, since what takes longer is kept from its work by something
        else."""
        return min(1.0, median_low(self._shares)) if self._shares else 1.0

    def learn(self, done: Round, lone: float) -> None:
        """Learn from a round among others, begun by the one before; lone: seconds of a lone one."""
        self._shares.append(done.seconds.passing / lone)
