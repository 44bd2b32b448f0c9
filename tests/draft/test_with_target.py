"""Draft and target together: what the draft knows of the text, and the doctor on a real pair."""

from dataclasses import replace

import numpy as np
import pytest

from specdec.budget import Fixed
from specdec.draft.doctor import examine
from specdec.draft.model import Draft
from specdec.load import Loaded, Settings, load
from specdec.tree.block import Block
from tests.checkpoints import FAMILIES
from tests.pairs import write_pair

PROMPT = list(range(5, 40))


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory) -> Loaded:
    pair = write_pair(tmp_path_factory.mktemp(request.param), request.param)
    return load(Settings(model=str(pair.target), draft=str(pair.draft), context=512))


def told_at_once(loaded: Loaded, tokens: list[int]) -> Draft:
    """A draft that is told of all the tokens by one prefill."""
    target, draft = loaded.engine.target, loaded.engine.draft
    assert draft is not None
    fresh = Draft(draft.config, draft.weights, draft.embedding, draft.head, draft.backend)
    target.reset()
    fresh.extend(target.prefill(tokens).taps)
    return fresh


@pytest.mark.parametrize("kind", ["best-first", "chain", "spine"])
def test_after_any_rounds_the_draft_knows_what_a_prefill_would_tell_it(loaded, monkeypatch, kind):
    """Taps of accepted rows only, each once and in order, and positions without a gap.

    The draft is random, so for the rounds somebody proposes who knows the answer: some of it is
    accepted, along a path that is not always the first in the tree.
    """
    engine = loaded.engine
    answer = [engine.prefill(PROMPT).token]
    while len(answer) < 60:
        answer += engine.step(Fixed(1)).tokens
    rng = np.random.default_rng(4)

    def knows(bonus: int, width: int, *slots) -> Block:
        assert engine.draft.length == engine.target.length
        at = engine.draft.length - len(PROMPT) + 1
        right = np.array(answer[at : at + 5])
        wrong = (right + rng.integers(1, 50, 5)) % loaded.engine.target.config.vocab_size
        swap = rng.random(5) < 0.4
        tokens = np.stack([np.where(swap, wrong, right), np.where(swap, right, wrong)], axis=1)
        return Block(tokens.astype(np.int32), np.log([[0.6, 0.4]] * 5))

    tokens, accepted = [*PROMPT], 0
    bonus = engine.prefill(PROMPT).token
    with monkeypatch.context() as patch:
        patch.setattr(engine.draft, "propose", knows)
        for budget in (1, 6, 3, 1, 12, 6, 2):
            done = engine.step(Fixed(budget), kind)
            accepted += done.accepted
            tokens += [bonus, *done.tokens[:-1]]
            bonus = done.bonus
    assert accepted >= 6
    assert tokens[len(PROMPT) :] == answer[: len(tokens) - len(PROMPT)]
    by_rounds: list[Block] = []
    propose = engine.draft.propose

    def noted(*ask):
        by_rounds.append(propose(*ask))
        return by_rounds[-1]

    monkeypatch.setattr(engine.draft, "propose", noted)
    engine.step(Fixed(12), kind)
    at_once = told_at_once(loaded, tokens).propose(bonus, 12)
    np.testing.assert_array_equal(by_rounds[0].tokens, at_once.tokens)
    np.testing.assert_allclose(by_rounds[0].log_probs, at_once.log_probs, atol=1e-4)


def test_doctor_of_an_untrained_pair(loaded):
    engine = loaded.engine
    taps = engine.target.taps
    found = examine(engine.target, engine.draft, PROMPT, 10)
    assert not found.fits
    assert found.slots[0].positions == 10
    assert engine.target.taps == taps
    assert (engine.target.length, engine.draft.length) == (0, 0)


def test_doctor_on_the_targets_own_text(loaded):
    """First-slot agreement is what rounds of a chain of one node accept at the same places."""
    engine = loaded.engine
    tokens = [*PROMPT, engine.prefill(PROMPT).token]
    while len(tokens) < len(PROMPT) + 15:
        tokens += engine.step(Fixed(1)).tokens
    positions = len(tokens) - len(PROMPT)
    found = examine(engine.target, engine.draft, tokens, positions)
    hits = 0
    for at in range(len(PROMPT), len(tokens)):
        draft = told_at_once(loaded, tokens[:at])
        target_says = int(np.argmax(np.array(engine.target.prefill(tokens[at : at + 1]).logits)))
        hits += int(draft.propose(tokens[at], 1).tokens[0, 0] == target_says)
    assert found.slots[0].hits == hits
    assert replace(found, trials=()).slots[0].positions == positions
