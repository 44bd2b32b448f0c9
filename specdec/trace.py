"""Trace: a routing log as a cache meets it: who asks for what, and what committed rows used.

A pass asks each layer once, for the distinct experts of all its rows; when it is committed, the
experts of the committed rows are told as used.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from specdec.routing_log import RoutingHeader, RoutingLog


@dataclass(frozen=True, eq=False)
class Trace:
    """asks, uses: int64 [n, 3], distinct (pass, layer's place in the header, expert), ascending.

    passes, tokens: of the log; tokens are those that were generated.
    """

    header: RoutingHeader
    asks: np.ndarray
    uses: np.ndarray
    passes: int
    tokens: int

    @classmethod
    def of(cls, log: RoutingLog) -> Self:
        first = int(log.rows["pass"][0])
        asks, uses = log.requests(), log.requests(log.committed)
        asks[:, 0] -= first
        uses[:, 0] -= first
        passes = int(log.rows["pass"][-1]) - first + 1
        return cls(log.header, asks, uses, passes, log.tokens)

    def part(self, layers: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """(asks, uses) of some layers (places in the header), renumbered in their order."""
        place = np.full(len(self.header.layers), -1)
        place[layers] = np.arange(len(layers))
        found = []
        for requests in (self.asks, self.uses):
            mine = requests[place[requests[:, 1]] >= 0]
            mine[:, 1] = place[mine[:, 1]]
            found.append(mine)
        return found[0], found[1]


def ask_starts(asks: np.ndarray) -> np.ndarray:
    """int64 [m + 1]: where each pass's asking of a layer begins, then the number of requests."""
    changes = (np.diff(asks[:, :2], axis=0, prepend=-1) != 0).any(axis=1)
    return np.append(np.flatnonzero(changes), len(asks))


def pass_starts(uses: np.ndarray, passes: int) -> np.ndarray:
    """int64 [passes + 1]: where each pass begins."""
    return np.searchsorted(uses[:, 0], np.arange(passes + 1)).astype(np.int64)
