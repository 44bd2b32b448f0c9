"""Times of the same text: what two ways of emitting it spent on each part of it.

Two runs of one prompt emit the same tokens in other rounds. Cut into blocks of tokens, their times
come in pairs, so that what makes a block slow for both (a longer context, a machine that is busy)
does not count as a difference between them.
"""

from collections.abc import Sequence
from typing import Protocol

from specdec.intervals import BLOCKS, Sums
from specdec.round import Round

LEAST = 4
"""Tokens of a block, at least."""


class Emitted(Protocol):
    """A run, made or recorded."""

    @property
    def tokens(self) -> tuple[int, ...]: ...

    @property
    def rounds(self) -> tuple[Round, ...]: ...


def block_times(ours: Sequence[Emitted], theirs: Sequence[Emitted]) -> list[Sums]:
    """Per block (their mean seconds, our mean seconds): their sums' ratio is our speed-up.

    ours, theirs: repeats of one prompt. Tokens that not all of them emitted are left out.
    """
    tokens = min(len(run.tokens) for run in (*ours, *theirs)) - 1  # the first is the prefill's
    blocks = max(1, min(BLOCKS, tokens // LEAST))
    edges = [tokens * at / blocks for at in range(blocks + 1)]
    mine, base = ([_spent(run.rounds, edges) for run in runs] for runs in (ours, theirs))
    return [
        (
            sum(run[at] for run in base) / len(theirs),
            sum(run[at] for run in mine) / len(ours),
        )
        for at in range(blocks)
    ]


def _spent(rounds: Sequence[Round], edges: Sequence[float]) -> list[float]:
    """Seconds between edges, in emitted tokens; a round's time is spread over its tokens."""
    spent, at = [0.0] * (len(edges) - 1), 0
    for one in rounds:
        count = one.accepted + 1
        each = sum(vars(one.seconds).values()) / count
        for block in range(len(spent)):
            within = min(at + count, edges[block + 1]) - max(at, edges[block])
            spent[block] += each * max(0.0, within)
        at += count
    return spent
