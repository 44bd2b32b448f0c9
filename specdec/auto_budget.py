"""Auto: the budget that pays for itself.

Per round, of all prefixes of the drafted tree (its nodes come by falling weight) the one that is
verified has the highest

    theta(n) = (1 + sum of the first n calibrated weights) / (cost of draft + cost of verify(n))

expected tokens per second (CaDDTree, 2606.01813). Costs are those that the rounds themselves
showed (round_costs.py), weights are calibrated by what was accepted (calibration.py). Plain
decoding is one of the choices: where drafting does not pay, it goes on alone, and drafting is tried
again from time to time (break_even.py).

What is emitted does not depend on any of it.
"""

from collections.abc import Sequence
from itertools import accumulate

from specdec.break_even import BreakEven
from specdec.calibration import Calibration, Edges
from specdec.overlap import Overlap
from specdec.round import Round
from specdec.round_costs import RoundCosts
from specdec.tree.draft_tree import DraftTree

AUTO_NODES = 16
"""The largest tree, unless said otherwise: what memory is planned for."""
PLAIN_ROUNDS = 3  # of a first text, to know what plain decoding costs; the first may compile
REFRESH = 64  # drafted rounds after which plain decoding is measured again
SHORTEST = 1e-9  # seconds; for clocks that stand still
HICCUP = 2.0  # times the expected cost; what a round takes beyond it says nothing of drafting
EXPLORE = 32  # drafted rounds after which one row count is chosen for what it may be


class Auto:
    """One engine's budget; what it learned of costs and draft stays from text to text."""

    def __init__(
        self,
        nodes: int,
        costs: RoundCosts,
        choices: Sequence[int] | None = None,
        ahead: bool = False,
    ) -> None:
        """nodes: of the largest tree, 2 or more. choices: numbers of nodes to choose from, None
        for any: where each costs a compilation, few. ahead: whether plain rounds may begin each
        other's passes."""
        assert nodes >= 2
        self.nodes, self.costs, self.calibration = nodes, costs, Calibration()
        self._choices = sorted({0, *(range(nodes + 1) if choices is None else choices)})
        self._choices = [one for one in self._choices if one <= nodes]
        self._even = BreakEven()
        self._overlap = Overlap() if ahead else None
        self._rounds = self._since_plain = 0  # drafted rounds; rounds since plain was measured
        # Seconds of a round of plain decoding: by itself, and as such rounds follow each other.
        self._lone = self._plain = SHORTEST
        self.begin()

    def begin(self) -> None:
        """A new text."""
        self._even.begin()
        self._context, self._untold, self._expected, self._seconds = 0, 0, 1.0, 0.0
        self.reason: str | None = None
        """Why plain decoding was chosen, the first time it was for this text; None if never."""

    def limit(self) -> int:
        if self._measuring():
            return 1
        risk = self._risk()
        if self._even.pays(risk):
            return self.nodes
        if self.reason is None:
            self.reason = self._explain(risk)
        return 1

    def stays_plain(self) -> bool:
        if self.costs.plain_rounds < PLAIN_ROUNDS:
            return False  # lone rounds come first, to compare with
        # A measured round begins another, the last of them in vain: it is not learned from yet.
        if self._measuring() or self._even.pausing:
            return True
        return not self._even.allows(self._risk(), later=1)

    def _measuring(self) -> bool:
        """Whether it is to be known what plain decoding costs, or to be known again."""
        if self.costs.plain_rounds < PLAIN_ROUNDS:
            return True
        if self._overlap is not None and not self._overlap.known:
            return True
        return self._since_plain > REFRESH * max(1.0, self._even.advantage) ** 2

    def _risk(self) -> float:
        """What drafting may lose, in plain rounds: the draft, and that the plain rounds around it
        do not follow each other."""
        draft = self.costs.draft(self._context, self._untold)
        return draft / self._plain + (self._lone / self._plain - 1)

    def cut(self, tree: DraftTree) -> DraftTree:
        self._edges = Edges.of(tree)
        weights = list(accumulate(self.calibration.weights(self._edges)))
        explore = self._rounds % EXPLORE == EXPLORE - 1
        passes = self.costs.passes(self._context, optimism=1.0 if explore else 0.0).tolist()
        draft = self.costs.draft(self._context, self._untold)
        # Twice the rows that were ever tried, at most: a wrong guess of a cost is cheap then.
        rows = min(tree.rows, 2 * self.costs.most_rows)
        best, most = 0, 0.0
        for nodes in self._choices:
            if nodes >= rows:
                break
            rate = weights[nodes] / max(draft + passes[nodes], SHORTEST)
            if rate > most:
                best, most = nodes, rate
        self._expected, self._seconds = weights[best], weights[best] / most
        return tree.first(best + 1)

    def learn(self, done: Round) -> None:
        self.costs.learn(done)
        self._context = done.context + len(done.path)
        self._untold += len(done.path) - done.told
        measured = done.tree.rows == 1 if self._overlap is None else done.among_others
        self._since_plain = 0 if measured else self._since_plain + 1
        drafted = done.budget > 1
        if drafted:
            self.calibration.learn(self._edges, done.tree.rows, done.path)
            self._rounds += 1
        if not self.costs.verify.known:
            return
        self._lone = self._plain = max(self.costs.plain(self._context), SHORTEST)
        if self._overlap is not None:
            if measured:
                self._overlap.learn(done, self._lone)
            self._plain *= self._overlap.share
        plain = self._plain
        drafting, passing = done.seconds.drafting, done.seconds.passing
        if not drafted:
            # The first of rounds that begin each other begins two passes, the last none.
            edge = 0.0 if measured else min(passing, HICCUP * self._lone) - plain
            self._even.plain((drafting + edge) / plain)
            return
        took = min(drafting + passing, HICCUP * self._seconds)
        # Half as it came and half as it was expected, both: see break_even.py.
        cost, tokens = (took + self._seconds) / 2, (len(done.tokens) + self._expected) / 2
        self._even.drafted(cost / plain, tokens)

    def _explain(self, risk: float) -> str:
        """Why not to draft now; risk: what a draft may lose, in plain rounds."""
        even, milliseconds = self._even, 1e3 * self._plain
        if even.pausing:
            return (
                f"speculation would cost {milliseconds * even.round_cost:.3g} ms for "
                f"{even.round_tokens:.2f} tokens, plain decoding "
                f"{milliseconds * even.round_tokens:.3g} ms"
            )
        return (
            f"speculation lost {milliseconds * even.loss:.3g} ms against plain decoding so far and "
            f"may lose {milliseconds * risk:.3g} ms in its next round"
        )
