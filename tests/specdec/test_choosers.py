"""Choosers on tiny targets: the same tokens for every tree, the right distribution for swor."""

from dataclasses import replace
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from specdec.budget import Fixed
from specdec.choose import Greedy
from specdec.engine import Engine
from specdec.kernels.array import to_numpy
from specdec.matching import Matching, host_rows
from specdec.sampling import Sampling
from specdec.seen import Seen
from specdec.swor import Swor, draft_probabilities
from specdec.tree.block import Block
from specdec.tree.build import KINDS
from specdec.tree.draft_tree import DraftTree
from tests.backends import CPU, each_exact_backend, needs_numba
from tests.chance import draw
from tests.cheating import CheatingDraft
from tests.checkpoints import FAMILIES, write_checkpoint
from tests.targets import load_target

VOCAB = 320
PROMPT = np.random.default_rng(11).integers(0, VOCAB, 30).tolist()
SAMPLINGS = (
    Sampling(temperature=0.7, seed=1),
    Sampling(temperature=1.4, top_p=0.9, repetition_penalty=1.5, seed=2),
    Sampling(temperature=1.0, top_k=12, min_p=0.01, repetition_penalty=0.8, seed=3),
    Sampling(repetition_penalty=1.7),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("choosers")
    return {family: write_checkpoint(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def targets(folders):
    loaded: dict = {}

    def take(family, backend):
        if (family, backend.name) not in loaded:
            loaded[family, backend.name] = load_target(folders[family], backend)
        return loaded[family, backend.name]

    yield take
    for target in loaded.values():
        target.experts.store.checkpoint.close()


@each_exact_backend
@pytest.mark.parametrize("number", range(len(SAMPLINGS)))
def test_matching_emits_plain_decodings_tokens_for_every_tree(number, backend, targets):
    """With a draft that knows them, so that long paths and branches are accepted."""
    sampling, family = SAMPLINGS[number], FAMILIES[number % len(FAMILIES)]
    target, length = targets(family, backend), 30
    truth = draw(Engine(target), PROMPT, sampling, 1, "chain", length + 10)
    assert len(set(truth)) > 5
    accepted, branched = [], 0
    for budget, kind in ((2, "chain"), (6, "best-first"), (12, "spine"), (24, "best-first")):
        draft: Any = CheatingDraft(truth, len(PROMPT), VOCAB, seed=budget)
        engine = Engine(target, draft)
        tokens = [engine.prefill(PROMPT, True, None, sampling).token]
        while len(tokens) < length:
            done = engine.step(Fixed(budget), kind)
            tokens.extend(done.tokens)
            accepted.append(done.accepted)
            branched += done.path != tuple(range(len(done.path)))
        assert tuple(tokens[:length]) == truth[:length], (budget, kind)
    assert max(accepted) >= 4
    assert branched > 0


@needs_numba
def test_another_seed_is_another_text_and_a_longer_prompt_the_same_one(targets):
    """Numbers belong to positions: a text goes on as it would have, from wherever it is resumed."""
    target, sampling = targets("qwen3_moe", CPU), SAMPLINGS[1]
    truth = draw(Engine(target), PROMPT, sampling, 1, "chain", 20)
    resumed = draw(Engine(target), [*PROMPT, *truth[:8]], sampling, 1, "chain", 12)
    assert resumed == truth[8:]
    other = Sampling(temperature=1.4, top_p=0.9, repetition_penalty=1.5, seed=9)
    assert draw(Engine(target), PROMPT, other, 1, "chain", 20) != truth


class Guesser:
    """A draft that proposes given tokens for every slot, with given probabilities."""

    def __init__(self, tokens, probabilities) -> None:
        order = np.argsort(-np.asarray(probabilities), kind="stable")
        self.block = Block(
            np.asarray(tokens, np.int32)[order][None].repeat(3, 0),
            np.log(np.asarray(probabilities)[order])[None].repeat(3, 0),
        )
        self.reset()

    def reset(self) -> None:
        self.length = 0

    compiled = False

    def extend(self, taps) -> None:
        self.length += len(taps)

    def propose(self, bonus, width, slots=None) -> Block:
        return Block(self.block.tokens[:slots], self.block.log_probs[:slots])


@needs_numba
@pytest.mark.parametrize("accept", ["match", "swor"])
def test_a_models_texts_follow_its_distribution(accept, targets):
    """Two tokens of a tiny random model, each among its three likeliest."""
    target, prompt, texts = targets("qwen3_5_moe", CPU), PROMPT[:5], 800
    plain = Sampling(temperature=1.5, top_k=3, accept=accept)

    def following(tokens):
        target.reset()
        logits = to_numpy(target.prefill(tokens).logits)[0].astype(np.float64)
        ids = np.argsort(-logits)[:3]
        weights = np.exp((logits[ids] - logits[ids[0]]) / plain.temperature)
        return dict(zip(ids.tolist(), weights / weights.sum(), strict=True))

    shares = {
        (first, second): one * other
        for first, one in following(prompt).items()
        for second, other in following([*prompt, first]).items()
    }
    guesses = sorted({second for _, second in shares})[:6]
    unlikely = next(token for token in range(VOCAB) if token not in guesses)
    draft: Any = Guesser([*guesses, unlikely], np.linspace(3, 1, len(guesses) + 1) / 15)
    assert len(guesses) >= 3
    counts = dict.fromkeys(shares, 0)
    for seed in range(texts):
        one = replace(plain, seed=seed)
        first, second = draw(Engine(target, draft), prompt, one, 4, "best-first", 2)
        counts[first, second] += 1
    expected = [share * texts for share in shares.values()]
    assert min(expected) > 5
    assert stats.chisquare(list(counts.values()), expected).pvalue > 1e-3


NAN = np.array([np.nan, 1.0, 2.0, np.inf], np.float32)


@pytest.mark.parametrize("chooser", [Greedy, Matching, Swor])
def test_rows_that_are_not_finite_are_left_to_the_commit(chooser):
    """The walk neither fails nor warns; the row is on the path, where the commit refuses it."""
    sampling = Sampling(temperature=1.0, accept="swor" if chooser is Swor else "match")
    one = chooser() if chooser is Greedy else chooser(sampling)
    one.commit([1, 2])
    block = Block(np.array([[0, 1, 2, 3]] * 2, np.int32), np.log(np.full((2, 4), 0.25)))
    tree = one.grow(3, block, 6, "best-first")
    path, bonus = one.walk(tree, np.stack([NAN] * tree.rows))
    assert path[0] == 0
    assert 0 <= bonus < 4
    finite = np.ones((tree.rows, 4), np.float32)
    path, _ = one.walk(tree, finite)
    rows = np.stack([finite[0] if row in path else NAN for row in range(tree.rows)])
    assert one.walk(tree, rows)[0] == path  # what is off the path has no say


def test_logits_of_a_gpu_are_read_as_float32():
    values = np.random.default_rng(0).normal(0, 2, (3, 7)).astype(np.float32)
    for dtype in (mx.float32, mx.bfloat16):
        logits = mx.array(values).astype(dtype)
        found = host_rows(logits)
        assert found.dtype == np.float32
        assert np.array_equal(found, np.array(logits.astype(mx.float32)))


@given(st.lists(st.lists(st.integers(0, 3000), max_size=400), max_size=6), st.data())
@settings(max_examples=30, deadline=None)
def test_seen_is_the_set_of_tokens(parts, data):
    seen = Seen()
    for part in parts:
        seen.add(part)
    path = data.draw(st.lists(st.integers(0, 3000), max_size=5))
    found = seen.along(path)
    assert set(found.tolist()) == set().union(*parts, path)
    assert set(seen.along([]).tolist()) == set().union(*parts)


@given(st.data())
def test_the_shape_of_a_swor_tree_does_not_depend_on_what_is_drawn(data):
    """Other draws, other tokens: parents and weights stay."""
    seed = data.draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    q = -np.sort(-rng.dirichlet(np.full(6, 0.5), 3) + 1e-12, axis=1)
    block = Block(np.stack([rng.permutation(6) for _ in range(3)]).astype(np.int32), np.log(q))
    budget, kind = data.draw(st.integers(2, 20)), data.draw(st.sampled_from(KINDS))
    base = Sampling(temperature=0.8, top_p=0.9, accept="swor")
    trees = [Swor(replace(base, seed=number)).grow(7, block, budget, kind) for number in range(8)]
    for tree in trees[1:]:
        assert np.array_equal(tree.parents, trees[0].parents)
        assert np.array_equal(tree.log_weights, trees[0].log_weights)
    probabilities = draft_probabilities(block, base)
    for tree in trees:
        assert np.isfinite(tree.log_weights).all()
        for row in range(1, tree.rows):
            slot = tree.depths[row] - 1
            allowed = block.tokens[slot, probabilities[slot] > 0]
            assert tree.tokens[row] in allowed
            siblings = tree.tokens[tree.parents == tree.parents[row]]
            assert len(set(siblings.tolist())) == len(siblings)


def test_a_tree_of_the_root_alone_draws_plain_decodings_token():
    logits = np.random.default_rng(0).normal(0, 2, (1, 50)).astype(np.float32)
    for seed, accept in product(range(20), ("match", "swor")):
        chooser = Swor if accept == "swor" else Matching
        one = chooser(Sampling(temperature=1.0, seed=seed, accept=accept))
        plain = Matching(Sampling(temperature=1.0, seed=seed))
        assert one.walk(DraftTree.root(4), logits) == plain.walk(DraftTree.root(4), logits)
