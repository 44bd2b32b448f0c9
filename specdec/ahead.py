"""Ahead: what a GPU begins beyond the round at hand, before the host knows how that one ends.

It is the next round, as it will be if it is like this one. Where tokens are not drawn the GPU finds
the path by itself: it verifies the next token, or drafts after the path, and where it grew the tree
by itself too, it grows and verifies the next one. Where the host finds the path, the GPU drafts
while the host commits. Nothing of it is committed: what the next round does not ask for, the draft
and the target drop.
"""

import numpy as np

from specdec.budget import Budget, Fixed
from specdec.choose import Greedy
from specdec.draft.graph import Drafted, Walk
from specdec.draft.model import Draft
from specdec.errors import NonFiniteError
from specdec.kernels.array import Array, to_numpy
from specdec.kernels.tapped import Taps
from specdec.kernels.walked import CAME
from specdec.target.grown_tree import GrownTree
from specdec.target.model import Target
from specdec.target.pending import Output
from specdec.tree.draft_tree import DraftTree


def can_look_past_lone(target: Target, chooser: Greedy) -> bool:
    """Whether a GPU can be given the pass after a lone root's before the host has read that one."""
    return target.compiled and chooser.on_device


class Ahead:
    """Of the rounds after one prompt.

    limit: the most nodes of a round's tree, 1 for plain decoding; bonus: the token at its root.
    """

    def __init__(self, target: Target, draft: Draft | None, chooser: Greedy) -> None:
        """draft: None where the prompt is decoded without one."""
        self._target, self._draft, self._chooser = target, draft, chooser
        self._lone: Output | None = None  # of a lone root's pass after the one at hand
        self._past: Drafted | None = None  # what is drafted after the round at hand
        self._next: tuple[Array, GrownTree] | None = None  # the same, and the tree grown of it

    def can_grow(self, budget: Budget, limit: int, kind: str) -> bool:
        """Whether a GPU grows the tree by itself, before the host has read what it drafted."""
        draft = self._draft
        ready = limit > 1 and draft is not None and draft.compiled
        # what is cut is chosen by the host
        chosen = isinstance(budget, Fixed) and kind == "best-first" and self._chooser.on_device
        return ready and chosen and self._target.can_grow(limit)

    def grow(self, bonus: int, limit: int) -> GrownTree:
        """That tree, begun now if it was not before. The draft knows of all that is committed."""
        assert self._draft is not None
        found = self._draft.answer(bonus, self._chooser.width(limit), limit)
        if self._next is not None and self._next[0] is found:
            return self._next[1]
        return self._target.grow(found, limit, bonus)

    def look_past_lone(self, output: Output, budget: Budget) -> tuple[bool, bool]:
        """In plain decoding, begin the pass that follows one that was begun, if it is likely to be
        asked for; whether that one was begun here too, and whether another was now."""
        before, self._lone = self._lone, None
        if can_look_past_lone(self._target, self._chooser) and budget.stays_plain():
            assert output.verdict is not None
            self._lone = self._target.look_ahead(output.verdict.lone_token)
        return before is output, self._lone is not None

    def look_past(self, tree: DraftTree | GrownTree, output: Output, limit: int) -> bool:
        """Begin to draft after a tree whose verify pass was begun; whether that could be."""
        self._lone = None
        verdict, draft = output.verdict, self._draft
        if verdict is None or not self._chooser.on_device:
            return False
        if draft is None or not draft.compiled:
            return False
        if isinstance(tree, GrownTree):
            walk = Walk(tree.made.tree, verdict.rows)
        else:
            walk = Walk(np.concatenate([tree.tokens, tree.parents]), verdict.rows)
        self._past = draft.look_past(output.tapped, walk, self._chooser.width(limit), limit)
        return True

    def read(self, grown: GrownTree, output: Output, bonus: int, limit: int) -> DraftTree:
        """The tree, once its pass is done: read back with what came of it. Before the host waits
        for that, the next tree's pass is begun behind what `look_past` drafted."""
        assert self._draft is not None
        assert self._past is not None
        assert self._past.came is not None
        assert output.verdict is not None
        found, came = self._past
        tree = self._target.look_past(found, limit, came)
        self._next = None if tree is None else (found, tree)
        numbers, end = to_numpy(came), CAME + 2 * grown.rows
        output.verdict.known(numbers[CAME:end])
        grown.known(numbers[end:])
        try:
            return grown.host
        except NonFiniteError:
            self._draft.probe(bonus)
            raise

    def look_ahead(self, taps: Taps, bonus: int, limit: int) -> None:
        """Begin to draft after a path that the host found, while it commits it."""
        assert self._draft is not None
        if self._draft.compiled:
            self._draft.look_ahead(taps, bonus, self._chooser.width(limit), limit)
