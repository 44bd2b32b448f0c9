"""A draft that knows what the target will say, and errs where it is told to.

Random tiny drafts are never right. This one proposes the true continuation, so that long paths,
partial acceptance and accepted branches are exercised. It checks on the way that it is asked at the
right place with the right bonus token.
"""

from collections.abc import Sequence

import numpy as np

from specdec.tree.block import Block

# Rank of the true token in its slot; None: not among the candidates.
ERRORS: tuple[int | None, ...] = (0, 0, 0, 0, 0, 1, 2, None)
PERFECT: tuple[int | None, ...] = (0,)
HOPELESS: tuple[int | None, ...] = (None,)


class CheatingDraft:
    """Stands for a Draft after a prompt of `prompt` tokens that goes on with `truth`."""

    def __init__(
        self,
        truth: Sequence[int],
        prompt: int,
        vocab: int,
        ranks: Sequence[int | None] = ERRORS,
        slots: int = 7,
        seed: int = 0,
    ) -> None:
        self.truth, self.prompt, self.vocab = list(truth), prompt, vocab
        self.ranks, self.slots, self.seed = ranks, slots, seed
        self.reset()

    def reset(self) -> None:
        self.length = 0

    compiled = False

    def extend(self, taps) -> None:
        self.length += len(taps)

    def propose(self, bonus: int, width: int, slots: int | None = None) -> Block:
        at = self.length - self.prompt
        assert at >= 0
        assert at >= len(self.truth) or self.truth[at] == bonus
        # The same proposal at the same place, however decoding came there.
        rng = np.random.default_rng((self.seed, at))
        tokens = np.empty((self.slots, width), np.int32)
        log_probs = np.empty((self.slots, width))
        for slot in range(self.slots):
            ids = rng.permutation(self.vocab)
            place = at + 1 + slot
            if place < len(self.truth):
                right = self.truth[place]
                ids = ids[ids != right]
                rank = self.ranks[int(rng.integers(len(self.ranks)))]
                if rank is not None and rank < width:
                    ids = np.insert(ids, rank, right)
            tokens[slot] = ids[:width]
            weights = np.sort(rng.dirichlet(np.full(width, 0.5)) + 1e-9)[::-1]
            log_probs[slot] = np.log(weights / (weights.sum() + rng.random()))
        return Block(tokens, log_probs)
