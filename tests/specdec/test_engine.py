"""Exactness: the tokens of budget 1, whatever the budget, the tree, the pins and the slots.

Equality, no tolerance. Tiny random drafts are hardly ever right, so most runs use one that cheats.
"""

import errno
import json
import os
import signal
from itertools import count, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import checkpoint as checkpoint_module
from specdec.budget import Fixed
from specdec.checkpoint import Checkpoint
from specdec.draft.config import DraftConfig
from specdec.draft.model import Draft
from specdec.engine import Engine
from specdec.errors import ExpertReadError, SpecdecError
from specdec.tree.build import KINDS
from tests.backends import CPU, each_backend, each_exact_backend, needs_numba
from tests.cheating import ERRORS, HOPELESS, PERFECT, CheatingDraft
from tests.checkpoints import FAMILIES, write_checkpoint
from tests.drafts import write_draft
from tests.targets import load_target, state_bytes
from tests.trees import path_to

VOCAB, SLOTS = 320, 7
PROMPT = np.random.default_rng(11).integers(0, VOCAB, 30).tolist()
LONG = np.random.default_rng(12).integers(0, VOCAB, 118).tolist()
# (pinned layers or None for all, slots): one expert at a time, several waves, one wave, no waiting
PLACES = ((None, 1), (0, 1), (0, 3), (1, 5), (2, 16), (3, 2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("engine")
    return {
        (family, packing): write_checkpoint(root / family / packing, family, quantize=quantize)
        for family in FAMILIES
        for packing, quantize in (("4bit", (4, 32)), ("dense", None))
    }


@pytest.fixture(scope="module")
def targets(folders):
    """Loaded targets by family, packing, backend and place."""
    loaded: dict = {}

    def take(family, packing, backend, place=PLACES[0], taps=()):
        key = (family, packing, backend.name, place, taps)
        if key not in loaded:
            pins, slots = place
            folder = folders[family, packing]
            loaded[key] = load_target(folder, backend, pins=pins, slots=slots, taps=taps)
        return loaded[key]

    yield take
    for target in loaded.values():
        target.experts.store.checkpoint.close()


def run(engine: Engine, prompt, budget: int, kind: str, length: int):
    """The first `length` emitted tokens, and the rounds."""
    prefill = engine.prefill(prompt, drafting=budget > 1)
    tokens, rounds = [prefill.token], []
    while len(tokens) < length:
        rounds.append(engine.step(Fixed(budget), kind))
        tokens.extend(rounds[-1].tokens)
    return tokens[:length], rounds


def truth_of(target, prompt, length: int) -> list[int]:
    tokens, rounds = run(Engine(target), prompt, 1, "chain", length)
    assert all(r.tree.rows == 1 and r.accepted == 0 for r in rounds)
    assert len(set(tokens)) > 3  # not stuck on one token
    return tokens


def cheating(target, truth, prompt, **options) -> Engine:
    draft: Any = CheatingDraft(truth, len(prompt), VOCAB, slots=SLOTS, **options)
    return Engine(target, draft)


@each_exact_backend
@pytest.mark.parametrize("packing", ["4bit", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_for_every_budget_tree_and_place(family, packing, backend, targets):
    """Every budget with two of the kinds (the slow reference: one), places in turn."""
    length = 20
    kinds = 2 if backend is CPU else 1
    truth = truth_of(targets(family, packing, backend), PROMPT, length + 10)
    accepted, branched, partial = [], 0, 0
    number = count(FAMILIES.index(family))
    for budget, kind in product(range(1, 25), KINDS):
        n = next(number)
        if (budget + KINDS.index(kind)) % 3 >= kinds:
            continue
        target = targets(family, packing, backend, PLACES[n % len(PLACES)])
        engine = cheating(target, truth, PROMPT, seed=n)
        tokens, rounds = run(engine, PROMPT, budget, kind, length)
        assert tokens == truth[:length], (budget, kind, target.experts.slots)
        for r in rounds:
            assert r.tree.rows <= budget + 1 if budget > 1 else r.tree.rows == 1
            accepted.append(r.accepted)
            branched += r.path != tuple(range(len(r.path)))
            partial += 0 < r.accepted < r.tree.depths.max()
    # what the test is about did happen
    assert set(accepted) >= {0, 1, 2, 3}
    assert max(accepted) >= SLOTS - 2
    assert branched > 3
    assert partial > 10


@each_exact_backend
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [PERFECT, HOPELESS], ids=["perfect", "hopeless"])
def test_drafts_that_are_always_and_never_right(family, ranks, backend, targets):
    """Past position 128 and past the first growth of the buffers at 256."""
    target = targets(family, "4bit", backend)
    prompt, length = (LONG * 3)[:245], 20
    truth = truth_of(target, prompt, length + 10)
    for kind in KINDS:
        engine = cheating(target, truth, prompt, ranks=ranks)
        tokens, rounds = run(engine, prompt, 9, kind, length)
        assert tokens == truth[:length]
        accepted = {r.accepted for r in rounds}
        if ranks is HOPELESS:
            assert accepted == {0}
        elif kind == "best-first":  # its own weights make it spend nodes beside the chain
            assert min(accepted) >= 1
        else:
            assert accepted == {SLOTS}


@needs_numba
@given(
    seed=st.integers(0, 2**20),
    length=st.sampled_from([1, 3, 59, 63, 64, 65, 118]),
    budgets=st.lists(st.integers(1, 24), min_size=1, max_size=6),
    kind=st.sampled_from(KINDS),
    place=st.sampled_from(PLACES),
    family=st.sampled_from(FAMILIES),
)
@settings(max_examples=25, deadline=None)
def test_budgets_may_change_from_round_to_round(
    targets, seed, length, budgets, kind, place, family
):
    prompt = LONG[:length]
    truth = truth_of(targets(family, "4bit", CPU), prompt, 30)
    engine = cheating(targets(family, "4bit", CPU, place), truth, prompt, seed=seed)
    tokens = [engine.prefill(prompt).token]
    for n in range(5):
        tokens.extend(engine.step(Fixed(budgets[n % len(budgets)]), kind).tokens)
        assert tokens[:30] == truth[: len(tokens)]
        if len(tokens) >= 30:
            break


@each_exact_backend
@pytest.mark.parametrize("family", FAMILIES)
def test_a_real_draft_changes_no_token(family, backend, targets, folders, tmp_path):
    """A tiny random draft: taps, context and proposals through the real code."""
    raw = json.loads((folders[family, "4bit"] / "config.json").read_text())
    folder = write_draft(tmp_path, raw)
    truth = truth_of(targets(family, "4bit", backend), PROMPT, 16)
    with Checkpoint.open(folder) as checkpoint:
        config = DraftConfig.from_dict(checkpoint.config, "config.json")
        for n, (budget, kind) in enumerate(zip((2, 24, 7), KINDS, strict=True)):
            place = PLACES[2 * n]
            target = targets(family, "4bit", backend, place, taps=tuple(config.target_layer_ids))
            draft = Draft.load(checkpoint, config, target.embedding, target.head, backend)
            engine = Engine(target, draft)
            tokens, rounds = run(engine, PROMPT, budget, kind, 16)
            assert tokens == truth
            nodes = min(budget, config.block_size - 1) if kind == "chain" else budget
            assert all(r.tree.rows == nodes + 1 for r in rounds)


@needs_numba
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_the_prompts_chunks_change_no_token(chunk, targets):
    target = targets("qwen3_next", "4bit", CPU)
    truth = truth_of(target, LONG, 20)
    seen: list[tuple[int, int]] = []
    draft: Any = CheatingDraft(truth, len(LONG), VOCAB)
    engine = Engine(target, draft, prefill_chunk=chunk)
    engine.prefill(LONG, on_progress=lambda done, total: seen.append((done, total)))
    assert draft.length == target.length == len(LONG)
    assert seen == [(min(at + chunk, 118), 118) for at in range(0, 118, chunk)]
    assert run(engine, LONG, 6, "best-first", 20)[0] == truth


@each_backend
def test_rounds_say_what_happened(backend, targets):
    target = targets("qwen3_moe", "4bit", backend)
    truth = truth_of(target, PROMPT, 40)
    engine = cheating(target, truth, PROMPT, ranks=ERRORS)
    prefill = engine.prefill(PROMPT)
    assert prefill.token == truth[0]
    assert prefill.prompt_tokens == len(PROMPT)
    emitted, bonus = [prefill.token], prefill.token
    for _ in range(6):
        r = engine.step(Fixed(5))
        assert r.tree.tokens[0] == bonus
        assert r.tree.rows == 6
        assert len(r.tokens) == r.accepted + 1 == len(r.path)
        assert list(r.path) == path_to(r.tree.parents, r.path[-1])
        assert target.length == len(PROMPT) + len(emitted) + r.accepted
        assert min(r.seconds.draft, r.seconds.build, r.seconds.verify, r.seconds.commit) >= 0
        emitted.extend(r.tokens)
        bonus = r.bonus
    assert emitted == truth[: len(emitted)]


@each_backend
def test_budgets_above_one_need_a_draft(backend, targets):
    target = targets("qwen3_moe", "4bit", backend)
    engine = Engine(target)
    with pytest.raises(AssertionError):
        engine.step(Fixed(1))
    engine.prefill(PROMPT)
    before = state_bytes(target)
    with pytest.raises(SpecdecError, match="budget 4 needs a draft"):
        engine.step(Fixed(4))
    assert state_bytes(target) == before
    engine.step(Fixed(1))
    truth = truth_of(target, PROMPT, 10)
    engine = cheating(target, truth, PROMPT)
    engine.prefill(PROMPT, drafting=False)
    with pytest.raises(SpecdecError, match="needs a draft"):
        engine.step(Fixed(4))


class Stumble(Exception):
    """Injected."""


@each_exact_backend
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["propose", "verify", "choose", "tell"])
@pytest.mark.parametrize("error", [Stumble, KeyboardInterrupt])
def test_an_error_amid_a_round_leaves_the_session_usable(
    family, where, error, backend, targets, monkeypatch
):
    target = targets(family, "4bit", backend, (0, 3))
    truth = truth_of(target, PROMPT, 30)
    engine = cheating(target, truth, PROMPT)
    assert engine.draft is not None
    tokens: list[Any] = [engine.prefill(PROMPT).token, *engine.step(Fixed(6)).tokens]
    before = state_bytes(target)

    def stumble(*_):
        raise error("amid the round")

    last_layer = target.layers[-1]
    with monkeypatch.context() as patch:
        if where == "propose":
            patch.setattr(engine.draft, "propose", stumble)
        elif where == "verify":
            patch.setattr(type(last_layer.mlp), "__call__", stumble)
        elif where == "choose":
            patch.setattr(engine.chooser, "walk", stumble)
        else:
            patch.setattr(engine.draft, "extend", stumble)
        with pytest.raises(error):
            engine.step(Fixed(6))
    assert state_bytes(target) == before
    while len(tokens) < 20:
        tokens.extend(engine.step(Fixed(6)).tokens)
    assert tokens[:20] == truth[:20]


@needs_numba
def test_ctrl_c_right_after_the_draft_was_told_tells_it_nothing_twice(targets, monkeypatch):
    target = targets(FAMILIES[0], "4bit", CPU, (0, 3))
    engine = cheating(target, truth_of(target, PROMPT, 30), PROMPT)
    engine.prefill(PROMPT)
    engine.step(Fixed(6))
    assert engine.draft is not None
    extend = engine.draft.extend

    def interrupted(taps):
        extend(taps)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(engine.draft, "extend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step(Fixed(6))
    assert engine.draft.length + engine._untold_rows() == target.length
    engine.step(Fixed(6))


@each_exact_backend
def test_a_disk_error_amid_a_round_is_reported_and_survived(backend, targets, monkeypatch):
    target = targets("qwen3_5_moe", "4bit", backend, (0, 3))
    truth = truth_of(target, PROMPT, 20)
    engine = cheating(target, truth, PROMPT)
    tokens = [engine.prefill(PROMPT).token]
    real, calls = checkpoint_module.read_at, count()

    def broken(descriptor, buffer, offset):
        if next(calls) > 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, buffer, offset)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "read_at", broken)
        with pytest.raises(ExpertReadError, match=r"model\.safetensors"):
            engine.step(Fixed(8))
    while len(tokens) < 20:
        tokens.extend(engine.step(Fixed(8)).tokens)
    assert tokens[:20] == truth
    assert run(engine, PROMPT, 8, "spine", 20)[0] == truth  # and the next request


@each_exact_backend
def test_requests_do_not_see_each_other(backend, targets):
    target = targets("qwen3_next", "4bit", backend, (1, 5))
    truth = truth_of(target, PROMPT, 20)
    engine = cheating(target, truth, PROMPT)
    assert run(engine, PROMPT, 6, "best-first", 20)[0] == truth
    engine.prefill(LONG, drafting=False)
    engine.step(Fixed(1))
    assert run(engine, PROMPT, 6, "best-first", 20)[0] == truth
