"""Target: the MoE model that decides every token.

`prefill` runs a prompt, chunk by chunk, `verify` a whole draft tree in one pass, `commit` makes one
of its paths part of the state. verify changes nothing that is committed: an error or an interrupt
between the two leaves the session as it was.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Self

import mlx.core as mx
import numpy as np

from specdec.checkpoint import Checkpoint
from specdec.kernels.array import (
    Array,
    Backend,
    evaluate,
    finite_rows,
    start,
)
from specdec.kernels.gpu.grown import grown
from specdec.kernels.gpu.in_place import in_place
from specdec.kernels.gpu.limits import MAX_ROWS, refused
from specdec.kernels.layout import TreeLayout
from specdec.kernels.norm import Norm
from specdec.kernels.rope import LONGEST_RUN, Rope
from specdec.kernels.walked import came_before
from specdec.kernels.weight import Weight
from specdec.target.commit_graph import CommitGraph
from specdec.target.config import TargetConfig
from specdec.target.expert_cache import ExpertCache
from specdec.target.grown_tree import GrownTree
from specdec.target.layer_clock import LayerClock
from specdec.target.layers import Layers
from specdec.target.passes import Pass, PromptPass, TreePass
from specdec.target.pending import Output, Pending, Verdict
from specdec.target.prefetch import Prefetcher
from specdec.target.state import State
from specdec.target.tolerance import Tolerance
from specdec.target.verify_graph import Refused, VerifyGraph
from specdec.tree.draft_tree import DraftTree

Observer = Callable[[np.ndarray, Pass, slice | list[int]], None]


class Target:
    """A loaded target and its session state."""

    def __init__(self, layers: Layers, experts: ExpertCache) -> None:
        self.model, self.experts = layers, experts
        self.config, self.backend = layers.config, layers.backend
        self.layers = layers.all
        self.rope = Rope(self.config.rope)
        self._graph = VerifyGraph(layers.part, self.config)
        self._commits = CommitGraph()
        # Told of each pass before it is committed: its tokens, the pass, the rows that will be.
        self.observers: list[Observer] = []
        self.tolerance: Tolerance | None = None
        self.prefetcher = Prefetcher(experts, self.config.vocab_size)
        unpinned = [mlp for mlp in layers.moe if not experts.is_pinned(mlp.layer)]
        for mlp, following in pairwise(unpinned):
            mlp.look_ahead(self.prefetcher, following)
        self.reset()

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: TargetConfig,
        experts: ExpertCache,
        backend: Backend,
        taps: Sequence[int] = (),
    ) -> Self:
        """Read all weights but the experts; CheckpointError as the manifest says."""
        return cls(Layers.load(checkpoint, config, experts, backend, taps), experts)

    @property
    def embedding(self) -> Weight:
        """[vocab, hidden]"""
        return self.model.embedding

    @property
    def norm(self) -> Norm:
        """Before the head."""
        return self.model.norm

    @property
    def head(self) -> Weight:
        """[vocab, hidden]"""
        return self.model.head

    @property
    def taps(self) -> tuple[int, ...]:
        """The layers whose output is kept."""
        return self.model.taps

    @taps.setter
    def taps(self, taps: tuple[int, ...]) -> None:
        self.model.taps = taps

    @property
    def clock(self) -> LayerClock | None:
        """Set to time the halves of every layer."""
        return self.model.clock

    @clock.setter
    def clock(self, clock: LayerClock | None) -> None:
        self.model.clock = clock

    def tolerate(self, tolerance: Tolerance) -> None:
        """Route by what is in memory from now on, within a margin: no longer exact."""
        self.tolerance = tolerance
        for mlp in self.model.moe:
            mlp.tolerance = tolerance

    def reset(self) -> None:
        """Forget all tokens."""
        self.state = State(self.config, self.backend)
        self._pending: Pending | None = None
        self._ahead: Pending | None = None  # what may follow it
        self._after: State | None = None  # the state after it, where a GPU found the path

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self.state.length

    def prefill(self, tokens: Sequence[int], all_logits: bool = False) -> Output:
        """Commit consecutive tokens, a prompt or a chunk of one, in one pass; taps of every row.

        logits [1, vocab] of the last row, or [rows, vocab] with all_logits. An error commits
        nothing.
        """
        assert len(tokens) > 0
        self._pending = self._ahead = self._after = None  # they were begun behind fewer tokens
        rows = np.array(tokens, np.int32)
        this = PromptPass(self.state, self.rope, len(rows))
        hidden, tapped = self.model.forward(rows, this)
        logits = self.model.logits(hidden if all_logits else hidden[-1:])
        evaluate(logits, *tapped)
        # The logits are the last row's alone; the taps, and later the keys, are every row's.
        if not (finite_rows(hidden).all() and finite_rows(logits).all()):
            self.model.refuse(rows, this)
        self._count(rows, this, slice(None))
        this.commit()
        return Output(logits, tapped)

    def foresee(self, tree: DraftTree) -> None:
        """A tree is about to be verified, maybe with more nodes: its experts may be read ahead."""
        self.prefetcher.foresee(tree.tokens)

    def can_grow(self, nodes: int) -> bool:
        """Whether `grow` does."""
        return self.compiled and not refused and nodes <= min(self.config.vocab_size, MAX_ROWS - 1)

    def grow(self, found: Array, nodes: int, bonus: int) -> GrownTree:
        """The best-first tree of so many nodes under the bonus token, grown by the GPU itself, to
        be verified next: found, as kernels.top_tokens, with as many candidates for each slot."""
        return self._grow(found, nodes, mx.array(came_before(bonus, self.state.length)))

    def _grow(self, found: Array, nodes: int, came: Array) -> GrownTree:
        gdn = self.config.gdn
        turn = self.rope.run(self.state.length, LONGEST_RUN)
        return GrownTree(grown(found, came, turn, nodes + 1, 0 if gdn is None else gdn.conv_kernel))

    def look_past(self, found: Array, nodes: int, came: Array) -> GrownTree | None:
        """Begin to commit the pending tree's path that the GPU found, and to verify the tree that
        it grows after it, before the host knows either. From then on that path can be committed
        and no other: the rows of others may be overwritten. If verify is then asked for another
        tree, nothing is lost. None where kernels do not write in place: MLX would copy keys and
        values.

        came: as kernels.walked; found, nodes: as for `grow`.
        """
        assert self._pending is not None
        if refused or not in_place():
            return None
        before = self._pending.this
        state = self._after = self._commits.ahead(before, came)
        state.make_room(before.tree.rows + nodes + 1)  # for all paths there can be
        tree = self._grow(found, nodes, came)
        try:
            self._ahead = self._begin_grown(tree, state, ahead=True)
        except Refused:
            return None
        return tree

    def _begin_grown(self, tree: GrownTree, state: State, ahead: bool = False) -> Pending:
        assert self.compiled  # others look at the tree, and another stands for it
        some = TreeLayout.of(np.arange(-1, tree.rows - 1))
        return self._begin(tree.made.tokens, TreePass(state, self.rope, some, tree, ahead))

    def verify(self, tree: DraftTree | GrownTree) -> Output:
        """Run all rows of a tree after the committed tokens; commits nothing.

        Logits may be NaN or Inf in rows that a draft alone led to: commit looks at its path.
        """
        ahead, self._ahead, self._pending, self._after = self._ahead, None, None, None
        # of the committed state it is only once what it was begun behind is committed
        if ahead is not None and ahead.this.state is not self.state:
            ahead = None
        grown = tree if isinstance(tree, GrownTree) else None
        if ahead is not None and ahead.grown is not grown:
            ahead = None  # a tree of the host is none that a GPU grew, whatever its tokens
        if isinstance(tree, GrownTree):
            ahead = ahead or self._begin_grown(tree, self.state)
        elif ahead is None or not np.array_equal(ahead.host_tokens(), tree.tokens):
            this = TreePass(self.state, self.rope, TreeLayout.of(tree.parents))
            ahead = self._begin(tree.tokens, this)
        self._pending = ahead
        return ahead.output

    def look_ahead(self, token: Array) -> Output:
        """Begin the pass of the lone root that follows the pending lone root, before either is
        known to the host: token int [1]. If verify is then asked for another, nothing is lost.

        For compiled passes, where a host would keep a GPU waiting.
        """
        assert self.compiled
        assert self._pending is not None
        assert self._pending.this.tree.rows == 1
        state = self._pending.this.after_root()
        this = TreePass(state, self.rope, TreeLayout.of(np.array([-1], np.int32)))
        self._ahead = self._begin(token, this)
        return self._ahead.output

    @property
    def compiled(self) -> bool:
        """Whether verify passes are graphs, which nobody looks into."""
        watched = self.clock is not None or self.tolerance is not None
        return self.backend.on_gpu and self.experts.all_pinned and not watched

    def _begin(self, tokens: Array, this: TreePass) -> Pending:
        run = self._graph if self.compiled else self.model.verify
        logits, tapped, found = run(tokens, this)
        # Slots must not be filled anew while a graph that reads them waits.
        begin = start if self.experts.all_pinned else evaluate
        begin(logits, *tapped, found, *this.arrays())
        self.prefetcher.passed()
        if self.backend.on_gpu:
            return Pending(tokens, this, Output(logits, tapped, Verdict(found)), None)
        return Pending(tokens, this, Output(logits, tapped), found)

    def commit(self, path: Sequence[int]) -> None:
        """Make a path of the verified tree (rows, the root first) part of the state.

        NonFiniteError, and nothing committed, where a row of the path met NaN or Inf.
        """
        assert self._pending is not None, "commit without a verified tree"
        pending, self._pending = self._pending, None
        ahead, self._ahead = self._ahead, None
        after, self._after = self._after, None
        pending.this.known()
        tokens = pending.host_tokens()
        if not pending.host_finite()[list(path)].all():
            rows = tokens[list(path)]
            self.model.refuse(rows, TreePass(self.state, self.rope, TreeLayout.chain(len(rows))))
        self._count(tokens, pending.this, list(path))
        # last: after it nothing can fail, and before it nothing is done
        if after is not None:
            self.state.advance(len(path), after.conv, after.recurrent)
        elif self.compiled:
            self._commits(pending.this, list(path))
        else:
            pending.this.commit(list(path))
        if ahead is not None:
            ahead.this.state = self.state  # what it was begun behind is committed
            self._ahead = ahead

    def _count(self, tokens: np.ndarray, this: Pass, rows: slice | list[int]) -> None:
        """Experts that committed rows used become recent in their slots; in pinned layers, which
        nobody asks for, experts that any row of the pass used count as hits."""
        for observer in self.observers:  # first: an error in one leaves everything as it was
            observer(tokens, this, rows)
        self.experts.count_hits(
            {i: chosen for i, chosen in this.chosen.items() if self.experts.is_pinned(i)}
        )
        if self.experts.all_pinned:
            return
        learnt = {i: this.chosen[i][rows] for i in self.prefetcher.layers}
        for layer, experts in learnt.items():
            self.experts.touch(layer, experts)
        self.prefetcher.learn(tokens[rows], learnt)
