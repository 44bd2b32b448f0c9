"""RoundCosts: what a round with a tree of n nodes will take, in seconds, learned from the rounds.

    draft + verify(rows) + misses(rows) x time of a miss

Draft is a median, in passes of one row: its cost hardly depends on the tree. Verify, commit
included, is a curve over rows and context. Experts that have to be read are a curve of their own,
because how many a pass misses depends on what the slots hold by now; the time of a miss is what
passes waited for reads, and what passes with more misses took longer beside that.
"""

from collections import deque
from statistics import median_low

import numpy as np

from specdec.cost_curve import CostCurve
from specdec.round import Round
from specdec.target.quotas import union

PER_ROW = 0.25  # prior: the cost of a further row, in costs of one row
PASS_NOISE, MISS_NOISE = 0.1, 0.3
DRAFT = 0.75  # prior, of two drafts: in costs of one row
DRAFTS = 9  # whose median counts
FEW_TOLD = 16  # tokens told to the draft in a round that is not a catching-up
# Rounds of plain decoding that are learned from together: there are many of them, and looking at
# each would be felt.
PLAIN_BATCH = 4
FORGET = 0.95  # of what misses took


class RoundCosts:
    """Learned costs of one machine and one pair of models."""

    def __init__(
        self, nodes: int, experts: int = 1, top_k: int = 1, compiled_each: bool = False
    ) -> None:
        """nodes: of the largest tree. experts, top_k: of a layer, for the prior of misses.
        compiled_each: whether each number of rows has kernels of its own."""
        rows = nodes + 1
        self.verify = CostCurve([1 + PER_ROW * i for i in range(rows)], PASS_NOISE, compiled_each)
        needed = [union(experts, top_k, i + 1) for i in range(rows)]
        self._misses = CostCurve([one / needed[0] for one in needed], MISS_NOISE)
        self._drafted = False
        self._drafts = deque([DRAFT, DRAFT], maxlen=DRAFTS)
        self._catching_up: deque[float] = deque(maxlen=DRAFTS)
        # Rounds of plain decoding that were not learned from yet: seconds, misses.
        self._plain: list[tuple[float, int]] = []
        self._missed = self._stalled = 0.0

    @property
    def plain_rounds(self) -> int:
        """Passes of one row that were seen."""
        return self.verify.seen[0]

    @property
    def most_rows(self) -> int:
        """Rows of the largest pass that was seen."""
        return self.verify.most_rows

    def learn(self, done: Round) -> None:
        """Learn from a round."""
        seconds, rows = done.seconds, done.tree.rows
        drafting = seconds.drafting
        took = max(seconds.passing - done.stall, 0.0)
        if done.misses or self._missed:
            # One more than there were: costs are relative, and a warm cache misses nothing.
            self._misses.add(rows, 0, done.misses + 1)
            self._missed = FORGET * self._missed + done.misses
            self._stalled = FORGET * self._stalled + done.stall
        unit = self._unit(done.context)
        if done.budget == 1:
            if done.told and unit:
                self._catching_up.append(drafting / done.told / unit)
            if not done.by_itself:
                return
            self._plain.append((took, done.misses))
            if len(self._plain) == PLAIN_BATCH or self.plain_rounds < PLAIN_BATCH:
                self._flush(done.context)
            return
        if self._drafted and unit:  # the first may compile
            self._drafts.append(max(drafting / unit - self._telling(done.told), 0.0))
        self._drafted = True
        self._flush(done.context)
        self.verify.add(rows, done.context, took, done.misses)

    def draft(self, context: int, told: int = 0) -> float:
        """Proposing a block and building its tree, once `told` tokens have been caught up with."""
        return (median_low(self._drafts) + self._telling(told)) * self._unit(context)

    def plain(self, context: int) -> float:
        """A round of plain decoding, by itself."""
        if not self._misses.known:
            return self.verify.one_row(context)
        misses = max(self._misses.one_row(0) - 1, 0.0)
        return self.verify.one_row(context, misses) + self._reading * misses

    def passes(self, context: int, optimism: float = 0.0) -> np.ndarray:
        """Verify passes of 1, 2, ... rows, reads and commit included [rows]."""
        if not self._misses.known:
            return self.verify.costs(context, optimism=optimism)
        misses = self.misses()
        return self.verify.costs(context, misses, optimism) + self._reading * misses

    def misses(self) -> np.ndarray:
        """Experts that passes of 1, 2, ... rows are expected to ask for and not find [rows]."""
        if not self._misses.known:
            return np.zeros(self.verify.rows)
        return np.maximum(self._misses.costs(0) - 1, 0.0)

    def _telling(self, told: int) -> float:
        """What telling the draft of more tokens than a round brings takes, in the same unit."""
        if told <= FEW_TOLD or not self._catching_up:
            return 0.0
        return told * median_low(self._catching_up)

    def _unit(self, context: int) -> float:
        """What drafting is measured by: a machine that is slower now is slower at both."""
        return self.verify.one_row(context) if self.verify.known else 0.0

    @property
    def _reading(self) -> float:
        """Seconds waited per miss."""
        return self._stalled / self._missed if self._missed else 0.0

    def _flush(self, context: int) -> None:
        """Learn from the plain rounds since the last time."""
        if self._plain:
            self.verify.add(1, context, *median_low(self._plain))
            self._plain.clear()
