"""Engine: the round. Draft a block, grow a tree, verify it, walk it, commit the path.

Plain autoregressive decoding is the same round with the root alone for a tree.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter

import numpy as np

from specdec.auto_budget import Auto
from specdec.budget import Budget, Fixed
from specdec.chooser import chooser
from specdec.draft.graph import Asked, Walk
from specdec.draft.model import Draft
from specdec.errors import NonFiniteError, SpecdecError
from specdec.interrupt import Interrupts
from specdec.kernels.array import Array, concatenate
from specdec.kernels.gpu.limits import TREE_NODES
from specdec.kernels.tapped import Taps
from specdec.kernels.walked import CAME
from specdec.round import PhaseSeconds, Prefill, Round
from specdec.round_costs import RoundCosts
from specdec.sampling import GREEDY, Sampling
from specdec.target.grown_tree import GrownTree
from specdec.target.model import Target
from specdec.target.pending import Output
from specdec.tree.block import Block
from specdec.tree.draft_tree import DraftTree

# While plain decoding goes on in a session that may draft again, the draft is told of this many
# tokens at a time: cheaper than one by one, and the taps that wait are bounded.
CATCH_UP_ROWS = 32


class Engine:
    """A target, maybe its draft, and the bonus token between them."""

    def __init__(
        self,
        target: Target,
        draft: Draft | None = None,
        prefill_chunk: int = 256,
        context: int | None = None,
        max_budget: int | None = None,
    ) -> None:
        """context, max_budget: what memory was planned for; None where nothing was."""
        self.target, self.draft = target, draft
        self.prefill_chunk, self.context, self.max_budget = prefill_chunk, context, max_budget
        self.autos: dict[tuple[int, Sampling], Auto] = {}
        self.reset()

    def auto(self, nodes: int, sampling: Sampling = GREEDY) -> Auto:
        """The budget that chooses trees of `nodes` nodes at most. What it learns stays with the
        engine: of this machine and this pair, and for each way of sampling what is accepted."""
        key = nodes, replace(sampling, seed=0)
        if key not in self.autos:
            config = self.target.config
            on_gpu = self.target.backend.on_gpu
            known = [auto.costs for (size, _), auto in self.autos.items() if size == nodes]
            known = known or [RoundCosts(nodes, config.num_experts, config.top_k, on_gpu)]
            self.autos[key] = Auto(nodes, known[0], TREE_NODES if on_gpu else None)
        return self.autos[key]

    def reset(self) -> None:
        """Forget all tokens; the experts in memory stay."""
        self.target.reset()
        if self.draft is not None:
            self.draft.reset()
        self._bonus: int | None = None
        self._drafting = False
        self._untold: list[Taps] = []  # of committed tokens the draft does not know of
        # Where a GPU goes on by itself: what it drafts after the round at hand, and the tree of it.
        self._past: Asked | None = None
        self._next: tuple[Array, GrownTree] | None = None

    def prefill(
        self,
        tokens: Sequence[int],
        drafting: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
        sampling: Sampling = GREEDY,
    ) -> Prefill:
        """Run a prompt from nothing. Without `drafting`, only budget 1 may follow.

        sampling: how tokens are chosen, until the next prompt.
        """
        self.reset()
        self.chooser = chooser(sampling)
        self._drafting = drafting and self.draft is not None
        start = perf_counter()
        for done in range(0, len(tokens), self.prefill_chunk):
            chunk = tokens[done : done + self.prefill_chunk]
            output = self.target.prefill(chunk)
            self.chooser.commit(chunk)
            if self._drafting:
                self._untold.append(Taps(output.tapped))
                self._tell_draft()
            if on_progress is not None:
                on_progress(done + len(chunk), len(tokens))
        self._bonus = self.chooser.first(output.logits)
        return Prefill(self._bonus, len(tokens), perf_counter() - start)

    def step(self, budget: Budget, kind: str = "best-first") -> Round:
        """One round with the tree that `budget` asks for; a limit of 1 is plain decoding."""
        assert self._bonus is not None, "step before prefill"
        limit, context, told = budget.limit(), self.target.length, self._untold_rows()
        misses, stall = self.target.experts.waited()
        asked = sum(self.target.experts.slot_requests())
        times = [perf_counter()]
        tree = DraftTree.root(self._bonus)
        self.target.foresee(tree)  # its reads go on while the draft is asked
        block = grown = None
        if self._grows(budget, limit, kind):
            grown = self._grow(limit)
        elif limit > 1:
            block = self._propose(limit)
        elif told >= CATCH_UP_ROWS:
            self._tell_draft()
        told -= self._untold_rows()
        times.append(perf_counter())
        if block is not None:
            tree = budget.cut(self.chooser.grow(self._bonus, block, limit, kind))
            self.target.foresee(tree)
        times.append(perf_counter())
        output = self.target.verify(grown or tree)
        verified = perf_counter()
        begun = self._look_past(limit, grown or tree, output)
        ahead = perf_counter() - verified if begun else 0.0
        if grown is not None:
            self._follow(limit)
            tree = self._known(grown, output)
        path, bonus = self.chooser.walk(tree, output.logits, output.verdict)
        times.append(perf_counter())
        taps = [Taps(output.tapped, path)] if self._drafting else []
        if block is not None and not begun:
            self._look_ahead(limit, taps[0], bonus)
        times.append(perf_counter())
        with Interrupts():  # a round is committed as a whole or not at all
            self.target.commit(path)
            self.chooser.commit(tree.tokens[list(path)].tolist())
            self._bonus = bonus
            self._untold += taps
        times.append(perf_counter())
        draft, build, verify, drafted, commit = np.diff(times).tolist()
        seconds = PhaseSeconds(draft + ahead + drafted, build, verify - ahead, commit)
        missed, stalled = self.target.experts.waited()
        done = Round(
            tree,
            path,
            bonus,
            seconds,
            budget=limit,
            context=context,
            told=told,
            experts=sum(self.target.experts.slot_requests()) - asked,
            misses=missed - misses,
            stall=stalled - stall,
        )
        budget.learn(done)
        return done

    def _grows(self, budget: Budget, limit: int, kind: str) -> bool:
        """Whether a GPU grows the tree by itself, before the host has read what it drafted."""
        draft = self.draft
        ready = limit > 1 and draft is not None and draft.compiled and self._drafting
        # what is cut is chosen by the host
        chosen = isinstance(budget, Fixed) and kind == "best-first" and self.chooser.on_device
        return ready and chosen and self.target.can_grow(limit)

    def _grow(self, budget: int) -> GrownTree:
        draft, asked = self._asked(budget)
        found = draft.answer(*asked)
        if self._next is not None and self._next[0] is found:
            return self._next[1]
        return self.target.grow(found, budget, asked[0])

    def _follow(self, limit: int) -> None:
        """Let a GPU that looked past this round verify the next tree as well."""
        assert self._past is not None
        found, came = self._past
        assert came is not None
        tree = self.target.look_past(found, limit, came)
        self._next = None if tree is None else (found, tree)

    def _known(self, grown: GrownTree, output: Output) -> DraftTree:
        """The tree, once the pass is done: read back with what came of it."""
        assert self.draft is not None
        assert self._bonus is not None
        assert self._past is not None
        assert output.verdict is not None
        numbers, end = np.array(self._past.came), CAME + 2 * grown.rows
        output.verdict.known(numbers[CAME:end])
        grown.known(numbers[end:])
        try:
            return grown.host
        except NonFiniteError:
            self.draft.probe(self._bonus)
            raise

    def _propose(self, budget: int) -> Block:
        draft, asked = self._asked(budget)
        return draft.propose(*asked)

    def _asked(self, budget: int) -> tuple[Draft, tuple[int, int, int]]:
        """The draft, told of all that is committed, and what to ask it for."""
        if self.draft is None or not self._drafting:
            raise SpecdecError(f"budget {budget} needs a draft model; budget 1 does not")
        assert self._bonus is not None
        self._tell_draft()
        assert self.draft.length == self.target.length
        # a tree is nowhere deeper than it has nodes
        return self.draft, (self._bonus, self.chooser.width(budget), budget)

    def _look_past(self, limit: int, tree: DraftTree | GrownTree, output: Output) -> bool:
        """Let a GPU go on with what the next round will ask for if it is like this one, before the
        host knows the path; whether the draft is at work then."""
        verdict = output.verdict
        if verdict is None or not self.chooser.on_device:
            return False
        if limit == 1:
            if self.target.compiled and not self._drafting:
                self.target.look_ahead(verdict.lone_token)
            return False
        if self.draft is None or not self.draft.compiled:
            return False
        if isinstance(tree, GrownTree):
            walk = Walk(tree.made.tree, verdict.rows)
        else:
            walk = Walk(np.concatenate([tree.tokens, tree.parents]), verdict.rows)
        self._past = self.draft.look_past(output.tapped, walk, self.chooser.width(limit), limit)
        return True

    def _look_ahead(self, limit: int, taps: Taps, bonus: int) -> None:
        """Let a GPU draft the next block while the host commits this round."""
        assert self.draft is not None
        if self.draft.compiled:
            self.draft.look_ahead(taps, bonus, self.chooser.width(limit), limit)

    def _untold_rows(self) -> int:
        return sum(len(taps) for taps in self._untold)

    def _tell_draft(self) -> None:
        """Extend the draft's context by what was committed since it last drafted.

        Part of drafting, not of the commit: after an error in it the round can be run again.
        """
        if self._untold:
            assert self.draft is not None
            taps = self._untold[0]
            if len(self._untold) > 1:
                taps = Taps([concatenate([taps.values for taps in self._untold])])
            with Interrupts():  # none is told twice
                self.draft.extend(taps)
                self._untold.clear()
