"""The doctor against targets whose draft is known: a draft trained under other settings."""

import re
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest

from specdec.draft import doctor
from specdec.draft.diagnosis import Agreement, Diagnosis, Trial
from specdec.draft.doctor import TEXT, examine
from specdec.draft.model import Draft
from specdec.errors import PairingError, PromptError
from specdec.kernels.array import Array, Backend
from specdec.kernels.rope import RopeConfig
from tests.draft.reference import HIDDEN, MLX, NUMPY, VOCAB, make_draft

LAYERS = 6
TOKENS = 70


@dataclass(frozen=True)
class Sizes:
    hidden_size: int = HIDDEN
    num_layers: int = LAYERS
    vocab_size: int = VOCAB


@dataclass(frozen=True)
class Output:
    logits: Array
    taps: Array


class Obedient:
    """A target that always says next what a certain draft would have drafted first.

    Its states are random rows per position. It is what a perfectly trained draft sees.
    """

    def __init__(self, draft: Draft, ids: tuple[int, ...], tokens: list[int]):
        self.config = Sizes()
        self.taps: tuple[int, ...] = (2,)
        self.states = np.random.default_rng(5).standard_normal((len(tokens), LAYERS, HIDDEN))
        self.place = draft.backend.place
        taps = self.states[:, list(ids)].reshape(len(tokens), -1).astype(np.float32)
        self.choices = []
        draft.reset()
        for position, token in enumerate(tokens):
            # (at position 0 a shifted draft has nowhere to go, and nobody looks)
            says = draft.propose(token, 1).tokens[0, 0] if position else 0
            self.choices.append(int(says))
            draft.extend(self.place(mx.array(taps[position : position + 1])))
        draft.reset()
        self.tokens, self.length = tokens, 0

    def reset(self) -> None:
        self.length = 0

    def prefill(self, tokens, *, all_logits: bool) -> Output:
        assert all_logits
        rows = slice(self.length, self.length + len(tokens))
        assert list(tokens) == self.tokens[rows]
        self.length += len(tokens)
        logits = np.zeros((len(tokens), VOCAB), np.float32)
        logits[np.arange(len(tokens)), self.choices[rows]] = 1.0
        taps = self.states[rows][:, list(self.taps)].reshape(len(tokens), -1)
        taps = taps.astype(np.float32)
        return Output(self.place(mx.array(logits)), self.place(mx.array(taps)))


def text(seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, TOKENS).tolist()


def other(draft: Draft, shift: int = 0, **changes) -> Draft:
    config = replace(draft.config, **changes)
    return Draft(config, draft.weights, draft.embedding, draft.head, draft.backend, shift)


@pytest.mark.parametrize("backend", [MLX, NUMPY])
def test_a_pair_that_fits(backend: Backend, monkeypatch):
    pytest.importorskip("numba")
    draft, _ = make_draft("all", backend=backend)
    target = Obedient(draft, draft.config.target_layer_ids, text())
    found = examine(target, draft, text(), positions=50)
    assert found.slots[0] == Agreement(50, 50)
    assert found.fits
    assert not found.trials
    assert found.culprit is None
    assert "The pair fits" in found.lines()[-1]
    monkeypatch.setattr(doctor, "PUBLISHED_MASK_IDS", (5,))
    thorough = examine(target, draft, text(), 20, thorough=True)
    assert len(thorough.trials) == 6
    assert thorough.culprit is None
    assert "mask token 5: " in "\n".join(thorough.lines())
    assert "slot 1: 100.0 % (50 of 50)" in "\n".join(found.lines())
    # as it found them
    assert (target.taps, target.length, draft.length) == ((2,), 0, 0)


def test_later_slots_are_judged_where_the_text_is_the_targets_own():
    """On its own greedy text every slot counts; on a strange text only the first."""
    draft, _ = make_draft("plain")
    strange = examine(Obedient(draft, draft.config.target_layer_ids, text()), draft, text())
    assert strange.slots[0].positions == TOKENS - 1
    assert strange.slots[1].positions < TOKENS // 2
    # a text that the target itself would have written
    tokens = [3]
    for _ in range(25):
        target = Obedient(draft, draft.config.target_layer_ids, tokens)
        tokens.append(target.choices[-1])
    target = Obedient(draft, draft.config.target_layer_ids, tokens)
    own = examine(target, draft, tokens)
    assert [slot.positions for slot in own.slots] == [25, 24, 23, 22, 21]
    # the reference: what the draft says, slot by slot
    hits = [0] * draft.config.slots
    taps = mx.array(target.states[:, list(draft.config.target_layer_ids)].astype(np.float32))
    for position in range(1, len(tokens)):
        draft.reset()
        draft.extend(taps[:position].reshape(position, -1))
        top = draft.propose(tokens[position], 1).tokens[:, 0]
        for slot in range(min(draft.config.slots, len(tokens) - position)):
            hits[slot] += int(top[slot] == target.choices[position + slot])
    assert [slot.hits for slot in own.slots] == hits


@pytest.mark.parametrize(
    ("case", "changes", "shift", "ids_step", "words"),
    [
        ("yarn", {"rope": RopeConfig(16, 1e4)}, 0, 0, "plain rope"),
        (
            "plain",
            {"rope": RopeConfig(16, 1e4, "yarn", 64.0, 4096)},
            0,
            0,
            "trained with YaRN",
        ),
        ("plain", {}, 0, 1, r"should be \[1, 4, 5\]"),
        ("plain", {}, 0, -1, r"should be \[0, 2, 3\]"),
        ("plain", {"mask_token_id": 17}, 0, 0, "it should be 17"),
        ("sliding", {"causal": (False, False)}, 0, 0, r"is_causal should be false \(for sliding"),
        ("plain", {"causal": (True, True)}, 0, 0, r"is_causal should be true \(for all"),
        ("plain", {}, 1, 0, "block positions one off"),
        ("plain", {}, -1, 0, "block positions one off"),
    ],
)
def test_the_setting_that_is_wrong_is_named(case, changes, shift, ids_step, words, monkeypatch):
    """The target follows a draft with the setting changed; the doctor sees the unchanged one."""
    # (of the seeds, one with which causal or not makes much of a difference to the first slot)
    draft, _ = make_draft(case, seed=8 if "causal" in changes and case == "plain" else 0)
    base = {1: (0, 3, 4), -1: (1, 3, 4), 0: draft.config.target_layer_ids}[ids_step]
    draft = other(draft, target_layer_ids=base)
    trained = other(draft, shift, **changes)
    tokens = text()
    target = Obedient(trained, tuple(i + ids_step for i in base), tokens)
    said: list[str] = []
    monkeypatch.setattr(doctor, "PUBLISHED_MASK_IDS", (5, 17))
    found = examine(target, draft, tokens, 40, on_progress=said.append)
    assert not found.fits, found.lines()
    assert found.culprit is not None, found.lines()
    assert pytest.approx(1.0, abs=0.02) == found.culprit.agreement.share
    assert re.search(words, found.lines()[-1]), found.lines()
    assert said[0] == "the target reads the text"
    assert found.culprit.change in said


def test_a_draft_of_another_target_is_not_blamed_on_a_setting():
    draft, _ = make_draft("yarn")
    stranger, _ = make_draft("yarn", seed=99)
    target = Obedient(stranger, stranger.config.target_layer_ids, text())
    found = examine(target, draft, text(), 40)
    assert found.first_slot < 0.2
    assert found.trials
    assert found.culprit is None
    assert "None of these explains it" in found.lines()[-1]


def test_refusals():
    draft, _ = make_draft("plain")
    target = Obedient(draft, draft.config.target_layer_ids, text())
    with pytest.raises(PromptError, match="1 tokens"):
        examine(target, draft, [4])
    target.config = Sizes(num_layers=4)
    with pytest.raises(PairingError, match="out of range"):
        examine(target, draft, text())


def test_lines_of_a_low_pair_say_what_was_measured():
    found = Diagnosis(
        40,
        (Agreement(10, 40), Agreement(1, 4), Agreement(0, 0)),
        (
            Trial("rope without yarn", "plain rope", Agreement(36, 40)),
            Trial("mask token 5", "mask 5", Agreement(12, 40)),
        ),
    )
    lines = "\n".join(found.lines())
    assert "slot 1: 25.0 % (10 of 40)" in lines
    assert "slot 2: 25.0 % (1 of 4)" in lines
    assert "slot 3" not in lines
    assert "rope without yarn: 90.0 % (36 of 40)" in lines
    assert lines.endswith("Most likely: plain rope.")
    barely = replace(found, trials=(Trial("x", "x", Agreement(15, 40)),))
    assert barely.culprit is None


def test_the_text_is_code_and_long_enough():
    compile(TEXT, "text", "exec")
    assert len(TEXT.split()) > 150
