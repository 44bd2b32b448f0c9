"""Engine: the round. Draft a block, grow a tree, verify it, walk it, commit the path.

Plain autoregressive decoding is the same round with the root alone for a tree.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter

from specdec.ahead import Ahead, can_look_past_lone
from specdec.auto_budget import Auto
from specdec.budget import Budget
from specdec.chooser import chooser
from specdec.draft.model import Draft
from specdec.errors import SpecdecError
from specdec.interrupt import Interrupts
from specdec.kernels.array import concatenate
from specdec.kernels.gpu.limits import TREE_NODES
from specdec.kernels.tapped import Taps
from specdec.round import PhaseClock, Prefill, Round
from specdec.round_costs import RoundCosts
from specdec.sampling import GREEDY, Sampling
from specdec.target.grown_tree import GrownTree
from specdec.target.model import Target
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
        self.autos: dict[tuple[int, Sampling, bool], Auto] = {}
        self.reset()

    def auto(self, nodes: int, sampling: Sampling = GREEDY) -> Auto:
        """The budget that chooses trees of `nodes` nodes at most. What it learns stays with the
        engine: of this machine and this pair, and for each way of sampling what is accepted."""
        ahead = can_look_past_lone(self.target, chooser(sampling))
        key = nodes, replace(sampling, seed=0), ahead
        if key not in self.autos:
            config = self.target.config
            on_gpu = self.target.backend.on_gpu
            known = [auto.costs for (size, *_), auto in self.autos.items() if size == nodes]
            known = known or [RoundCosts(nodes, config.num_experts, config.top_k, on_gpu)]
            self.autos[key] = Auto(nodes, known[0], TREE_NODES if on_gpu else None, ahead)
        return self.autos[key]

    def reset(self) -> None:
        """Forget all tokens; the experts in memory stay."""
        self.target.reset()
        if self.draft is not None:
            self.draft.reset()
        self._bonus: int | None = None
        self._drafting = False
        self._untold: list[Taps] = []  # of committed tokens the draft does not know of

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
        self._ahead = Ahead(self.target, self.draft if self._drafting else None, self.chooser)
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
        clock = PhaseClock()
        tree: DraftTree | GrownTree
        tree = DraftTree.root(self._bonus)
        self.target.foresee(tree)  # its reads go on while the draft is asked
        block = None
        if self._ahead.can_grow(budget, limit, kind):
            self._tell_draft()
            tree = self._ahead.grow(self._bonus, limit)
        elif limit > 1:
            block = self._propose(limit)
        elif told >= CATCH_UP_ROWS:
            self._tell_draft()
        told -= self._untold_rows()
        clock.lap("draft")
        if block is not None:
            tree = budget.cut(self.chooser.grow(self._bonus, block, limit, kind))
            self.target.foresee(tree)
        clock.lap("build")
        output = self.target.verify(tree)
        clock.lap("verify")
        begun = before = follows = False
        if limit == 1:
            before, follows = self._ahead.look_past_lone(output, budget)
        elif begun := self._ahead.look_past(tree, output, limit):
            clock.lap("draft")
        if isinstance(tree, GrownTree):
            tree = self._ahead.read(tree, output, self._bonus, limit)
        path, bonus = self.chooser.walk(tree, output.logits, output.verdict)
        clock.lap("verify")
        taps = [Taps(output.tapped, path)] if self._drafting else []
        if limit > 1 and not begun:
            self._ahead.look_ahead(taps[0], bonus, limit)
        clock.lap("draft")
        with Interrupts():  # a round is committed as a whole or not at all
            self.target.commit(path)
            self.chooser.commit(tree.tokens[list(path)].tolist())
            self._bonus = bonus
            self._untold += taps
        clock.lap("commit")
        missed, stalled = self.target.experts.waited()
        done = Round(
            tree,
            path,
            bonus,
            clock.seconds,
            budget=limit,
            context=context,
            told=told,
            experts=sum(self.target.experts.slot_requests()) - asked,
            misses=missed - misses,
            stall=stalled - stall,
            begun_before=before,
            begins_next=follows,
        )
        budget.learn(done)
        return done

    def _propose(self, limit: int) -> Block:
        if self.draft is None or not self._drafting:
            raise SpecdecError(f"budget {limit} needs a draft model; budget 1 does not")
        assert self._bonus is not None
        self._tell_draft()
        # a tree is nowhere deeper than it has nodes
        return self.draft.propose(self._bonus, self.chooser.width(limit), limit)

    def _untold_rows(self) -> int:
        return sum(len(taps) for taps in self._untold)

    def _tell_draft(self) -> None:
        """Extend the draft's context by what was committed since it last drafted.

        Part of drafting, not of the commit: after an error in it the round can be run again.
        """
        assert self.draft is not None
        if self._untold:
            taps = self._untold[0]
            if len(self._untold) > 1:
                taps = Taps([concatenate([taps.values for taps in self._untold])])
            with Interrupts():  # none is told twice
                self.draft.extend(taps)
                self._untold.clear()
        assert self.draft.length == self.target.length
