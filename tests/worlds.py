"""A world for budgets: rounds whose costs and acceptance are known, and a clock of its own.

No model and no real time: what a budget decides is played against what would have been best.
"""

from collections.abc import Callable

import numpy as np

from specdec.budget import Budget
from specdec.round import PhaseSeconds, Round
from specdec.tree.block import Block
from specdec.tree.build import build
from specdec.tree.draft_tree import DraftTree

SLOTS, WIDTH = 7, 8


class World:
    """Draws drafts, says what the target takes of them, and what a round costs.

    verify(rows, context) and draft: seconds. confidence: mean probability of a slot's best token;
    the draft's probabilities are off by the factors `top` (below the best path) and `side`.
    noise: relative, of every time; hiccups: share of rounds that take ten times as long.
    misses(rows): experts read, at `miss` seconds each. waiting: None, or the share of a lone
    plain round in which the host waits for the GPU, half at most; in the rest it begins the pass.
    Where it begins the next one first it does not wait.
    """

    def __init__(
        self,
        verify: Callable[[int, int], float],
        draft: float,
        confidence: float = 0.7,
        top: float = 1.0,
        side: float = 0.7,
        noise: float = 0.03,
        hiccups: float = 0.0,
        misses: Callable[[int], float] = lambda rows: 0.0,
        miss: float = 0.0,
        seed: int = 0,
        waiting: float | None = None,
    ) -> None:
        self.verify, self.draft, self.confidence = verify, draft, confidence
        self.top, self.side, self.noise, self.hiccups = top, side, noise, hiccups
        assert waiting is None or waiting <= 0.5
        self.misses, self.miss, self.waiting, self.begun = misses, miss, waiting, False
        self.rng = np.random.default_rng(seed)
        self.context = self.untold = 0
        self.seconds = 0.0
        self.rounds: list[Round] = []

    @property
    def tokens(self) -> int:
        return sum(len(one.tokens) for one in self.rounds)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    def play(self, budget: Budget, tokens: int) -> "World":
        """Rounds until that many more tokens have come."""
        until = self.context + tokens
        while self.context < until:
            self.step(budget)
        return self

    def step(self, budget: Budget) -> Round:
        limit, told, drafting = budget.limit(), 0, 0.0
        tree = DraftTree.root(0)
        if limit > 1:
            tree = budget.cut(self.tree(limit))
            told, drafting = self.untold, self._time(self.draft)
        path = self._path(tree)
        misses = round(self.misses(tree.rows))
        stall = misses * self.miss
        begun, self.begun, plain = self.begun, False, limit == 1
        passed = self.verify(tree.rows, self.context)
        if self.waiting is not None:
            wait = self.waiting * self.verify(1, self.context)
            if plain:
                self.begun = budget.stays_plain()
                passed = (passed - wait) * ((not begun) + self.begun) + wait * (not self.begun)
            else:
                passed += wait * begun  # for a pass in vain
        verify = self._time(passed) + stall
        done = Round(
            tree,
            path,
            0,
            PhaseSeconds(drafting, 0.0, verify, 0.0),
            budget=limit,
            context=self.context,
            told=told,
            misses=misses,
            stall=stall,
            begun_before=plain and begun,
            begins_next=self.begun,
        )
        budget.learn(done)
        self.untold += len(path) - told
        self.context += len(path)
        self.seconds += drafting + verify
        self.rounds.append(done)
        return done

    def tree(self, nodes: int) -> DraftTree:
        best = self.rng.beta(4 * self.confidence, 4 * (1 - self.confidence), SLOTS)
        best = np.clip(best, 1 / WIDTH, 0.999)
        rest = (1 - best)[:, None] * 0.6 ** np.arange(1, WIDTH) / 1.5
        logs = np.log(np.concatenate([best[:, None], np.minimum(rest, best[:, None])], axis=1))
        tokens = np.tile(np.arange(WIDTH, dtype=np.int32), (SLOTS, 1))
        return build(0, Block(tokens, logs), nodes)

    def _path(self, tree: DraftTree) -> tuple[int, ...]:
        """Children are accepted with the draft's probability times a factor."""
        path, end, chance = [0], 0, self.rng.random()
        for row in range(1, tree.rows):
            if tree.parents[row] != path[-1]:
                continue
            factor = self.top if path[-1] == end else self.side
            probability = np.exp(tree.log_weights[row] - tree.log_weights[path[-1]]) * factor
            if chance < probability:
                first = not any(tree.parents[path[-1] + 1 : row] == path[-1])
                end = row if path[-1] == end and first else end
                path.append(row)
                chance = self.rng.random()
            else:
                chance -= probability
        return tuple(path)

    def _time(self, seconds: float) -> float:
        seconds *= np.exp(self.noise * self.rng.normal())
        return seconds * (10 if self.rng.random() < self.hiccups else 1)


def linear(one: float, each: float, growth: float = 0.0) -> Callable[[int, int], float]:
    """Costs that grow with the rows and, for every row, with the context."""
    return lambda rows, context: one + each * (rows - 1) + growth * rows * context
