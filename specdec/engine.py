"""Engine: the round. Draft a block, grow a tree, verify it, walk it, commit the path.

Plain autoregressive decoding is the same round with the root alone for a tree.
"""

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np

from specdec.choose import greedy
from specdec.draft.model import Draft
from specdec.errors import SpecdecError
from specdec.kernels.array import Array
from specdec.round import PhaseSeconds, Prefill, Round
from specdec.target.model import Target
from specdec.tree.block import Block
from specdec.tree.build import build
from specdec.tree.draft_tree import DraftTree
from specdec.tree.walk import walk


class Engine:
    """A target, maybe its draft, and the bonus token between them."""

    def __init__(
        self,
        target: Target,
        draft: Draft | None = None,
        choose: Callable[[Array], np.ndarray] = greedy,
        prefill_chunk: int = 256,
    ) -> None:
        """choose: logits [rows, vocab] -> int [rows], the target's token after each row."""
        self.target, self.draft, self.choose = target, draft, choose
        self.prefill_chunk = prefill_chunk
        self.reset()

    def reset(self) -> None:
        """Forget all tokens; the experts in memory stay."""
        self.target.reset()
        if self.draft is not None:
            self.draft.reset()
        self._bonus: int | None = None
        self._drafting = False

    def prefill(
        self,
        tokens: Sequence[int],
        drafting: bool = True,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Prefill:
        """Run a prompt from nothing. Without `drafting`, only budget 1 may follow."""
        self.reset()
        start = perf_counter()
        output = self.target.prefill(tokens, on_progress, self.prefill_chunk)
        self._drafting = drafting and self.draft is not None
        if self._drafting:
            self._extend(output.taps)
        self._bonus = int(self.choose(output.logits)[0])
        return Prefill(self._bonus, len(tokens), perf_counter() - start)

    def step(self, budget: int, kind: str = "best-first") -> Round:
        """One round with a tree of `budget` nodes; 1 is plain decoding with the root alone."""
        assert self._bonus is not None, "step before prefill"
        times = [perf_counter()]
        tree = DraftTree.root(self._bonus)
        block = self._propose(budget) if budget > 1 else None
        times.append(perf_counter())
        if block is not None:
            tree = build(self._bonus, block, budget, kind)
        times.append(perf_counter())
        output = self.target.verify(tree)
        path, bonus = walk(tree, self.choose(output.logits))
        times.append(perf_counter())
        self.target.commit(path)
        if self._drafting:
            self._extend(output.taps[self.target.backend.index(path)])
        self._bonus = bonus
        times.append(perf_counter())
        draft, built, verify, commit = np.diff(times).tolist()
        return Round(tree, path, bonus, PhaseSeconds(draft, built, verify, commit))

    def _propose(self, budget: int) -> Block:
        if self.draft is None or not self._drafting:
            raise SpecdecError(f"budget {budget} needs a draft model; budget 1 does not")
        assert self._bonus is not None
        return self.draft.propose(self._bonus, budget)

    def _extend(self, taps: Array) -> None:
        assert self.draft is not None
        self.draft.extend(taps)
