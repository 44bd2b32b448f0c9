"""Budgets that change from round to round, on the real engine: no token and no bit differs."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.auto_budget import AUTO_NODES, Auto
from specdec.budget import Fixed
from specdec.draft.model import Draft
from specdec.engine import CATCH_UP_ROWS, Engine
from specdec.generation import Request, generate
from specdec.kernels.gpu.limits import TREE_NODES
from specdec.load import Settings, load
from specdec.sampling import Sampling
from specdec.tree.build import KINDS
from tests.backends import CPU, each_exact_backend, needs_numba
from tests.cheating import ERRORS, HOPELESS, CheatingDraft
from tests.checkpoints import write_checkpoint
from tests.pairs import write_pair
from tests.targets import load_target, state_bytes

VOCAB = 320
PROMPT = np.random.default_rng(21).integers(0, VOCAB, 30).tolist()


class Whim:
    """Any limit and any part of the tree, each of a seed; long stretches without a draft."""

    def __init__(self, seed: int, plain: float = 0.1, longest: int = 80) -> None:
        self.rng, self.plain, self.longest = np.random.default_rng(seed), plain, longest
        self.waiting = 0
        self.done: list[Any] = []

    def limit(self) -> int:
        if self.waiting == 0 and self.rng.random() < self.plain:
            self.waiting = int(self.rng.integers(1, self.longest))
        if self.waiting:
            self.waiting -= 1
            return 1
        return int(self.rng.integers(2, 17))

    def stays_plain(self) -> bool:
        return bool(self.rng.integers(2))  # right or wrong

    def cut(self, tree):
        return tree.first(int(self.rng.integers(1, tree.rows + 1)))

    def learn(self, done) -> None:
        self.done.append(done)


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("budgets"), "qwen3_5_moe")
    loaded: dict = {}

    def take(backend, pins=None, slots=1):
        key = backend.name, pins, slots
        if key not in loaded:
            loaded[key] = load_target(folder, backend, pins=pins, slots=slots)
        return loaded[key]

    yield take
    for target in loaded.values():
        target.experts.store.checkpoint.close()


@pytest.fixture(scope="module")
def truths(targets):
    """The tokens of plain decoding, by backend: the same for all."""
    known: dict = {}

    def take(backend):
        if backend.name not in known:
            engine = Engine(targets(backend))
            known[backend.name] = run(engine, Fixed(1), 200)
        return known[backend.name]

    return take


def cheating(target, truth, **options) -> Engine:
    draft: Any = CheatingDraft(truth, len(PROMPT), VOCAB, **options)
    return Engine(target, draft)


def run(engine, budget, length, kind="best-first"):
    tokens = [engine.prefill(PROMPT).token]
    while len(tokens) < length:
        tokens.extend(engine.step(budget, kind).tokens)
    return tokens[:length]


@needs_numba
@given(
    seed=st.integers(0, 2**20),
    plain=st.sampled_from([0.02, 0.1, 0.5]),
    kind=st.sampled_from(KINDS),
    place=st.sampled_from([(None, 1), (0, 3), (1, 5)]),
)
@settings(max_examples=10, deadline=None)
def test_any_budget_in_any_round_changes_no_token(targets, truths, seed, plain, kind, place):
    """Nor the committed state, which is that of plain decoding, bit by bit."""
    length = 130
    truth, target = truths(CPU), targets(CPU, *place)
    engine, whim = cheating(target, truth, seed=seed), Whim(seed, plain)
    assert run(engine, whim, length, kind) == truth[:length]
    reached = target.length
    left = state_bytes(target)
    plainly = Engine(target)
    plainly.prefill(PROMPT)
    while target.length < reached:
        plainly.step(Fixed(1))
    assert state_bytes(target) == left
    for done in whim.done:
        assert done.tree.rows <= max(1, done.budget + 1)
        assert done.context >= len(PROMPT)


@each_exact_backend
def test_the_draft_catches_up_in_pieces(backend, targets, truths):
    """However long it was not asked: a bounded number of tokens waits for it, and then none."""
    target = targets(backend)
    engine = cheating(target, truths(backend))
    assert engine.draft is not None
    engine.prefill(PROMPT)
    for _ in range(100):
        done = engine.step(Fixed(1))
        waiting = target.length - engine.draft.length
        assert waiting == engine._untold_rows() <= CATCH_UP_ROWS
        assert done.told in (0, CATCH_UP_ROWS)
        assert (done.seconds.draft > 0) if done.told else True
    done = engine.step(Fixed(4))
    assert done.told == waiting
    assert engine.draft.length == done.context


@each_exact_backend
@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("extend", RuntimeError),
        ("propose", KeyboardInterrupt),
        ("verify", RuntimeError),
        ("cut", KeyboardInterrupt),
    ],
)
def test_an_error_while_catching_up_leaves_the_session_usable(
    where, error, backend, targets, truths, monkeypatch
):
    target, truth = targets(backend, 0, 3), truths(backend)
    engine, budget = cheating(target, truth), Whim(3)
    tokens = [engine.prefill(PROMPT).token]
    for _ in range(CATCH_UP_ROWS + 5):
        tokens.extend(engine.step(Fixed(1)).tokens)
    before = state_bytes(target)

    def stumble(*_):
        raise error("amid the round")

    with monkeypatch.context() as patch:
        if where == "verify":
            patch.setattr(type(target.layers[-1].mlp), "__call__", stumble)
        else:
            patch.setattr(budget if where == "cut" else engine.draft, where, stumble)
        patch.setattr(budget, "limit", lambda: 6)
        with pytest.raises(error):
            engine.step(budget)
    assert budget.done == []
    assert state_bytes(target) == before
    while len(tokens) < 120:
        tokens.extend(engine.step(budget).tokens)
    assert tokens[:120] == truth[:120]


@needs_numba
@pytest.mark.parametrize("ranks", [ERRORS, HOPELESS], ids=["errs", "hopeless"])
def test_auto_changes_no_token(ranks, targets, truths):
    truth = truths(CPU)
    for place in ((None, 1), (0, 3)):
        engine = cheating(targets(CPU, *place), truth, ranks=ranks)
        auto = engine.auto(AUTO_NODES)
        for _ in range(2):
            auto.begin()
            assert run(engine, auto, 180) == truth[:180]


@needs_numba
def test_what_was_learned_stays_with_the_engine(targets, truths):
    engine = cheating(targets(CPU, 0, 3), truths(CPU))
    auto = engine.auto(6)
    assert engine.auto(6) is auto
    assert engine.auto(7) is not auto
    warm = engine.auto(6, Sampling(temperature=0.8, seed=1))
    assert warm.costs is auto.costs  # a round costs the same; what is accepted is another matter
    assert warm.calibration is not auto.calibration
    assert engine.auto(6, Sampling(temperature=0.8, seed=2)) is warm
    run(engine, auto, 40)
    seen = auto.costs.plain_rounds
    assert seen > 0
    assert auto.costs.passes(40)[0] > 0
    assert auto.costs.misses()[0] > 3  # the slots hold three experts: it streams
    auto.begin()
    assert auto.costs.plain_rounds == seen


# --- requests, and the command line


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    pair = write_pair(tmp_path_factory.mktemp("auto_pair"))
    settings = Settings(model=str(pair.target), draft=str(pair.draft), context=300, budget=20)
    return load(settings)


def test_a_request_makes_the_budget(loaded, monkeypatch):
    true, seen = Engine.step, []

    def spy(engine, budget, kind):
        seen.append(budget)
        return true(engine, budget, kind)

    monkeypatch.setattr(Engine, "step", spy)
    request = Request(tuple(PROMPT), "auto", max_tokens=5)
    for max_budget, nodes in ((None, AUTO_NODES), (4, 4), (20, 20)):
        generate(
            loaded.engine,
            loaded.tokenizer,
            Request(tuple(PROMPT), "auto", max_tokens=5, max_budget=max_budget),
        )
        assert isinstance(seen[-1], Auto)
        assert seen[-1].nodes == nodes
    with monkeypatch.context() as patch:  # no more than was planned for
        patch.setattr(loaded.engine, "max_budget", 8)
        generate(loaded.engine, loaded.tokenizer, request)
        assert seen[-1].nodes == 8
    with monkeypatch.context() as patch:
        patch.setattr(loaded.engine, "draft", None)
        result = generate(loaded.engine, loaded.tokenizer, request)
        assert seen[-1] == Fixed(1)
        assert result.plain_reason is None


def test_trees_on_a_gpu_have_few_sizes(loaded, monkeypatch):
    engine = Engine(loaded.engine.target, loaded.engine.draft)
    assert isinstance(engine.draft, Draft)
    assert engine.auto(16)._choices == list(range(17))
    monkeypatch.setattr(type(engine.target.backend), "on_gpu", property(lambda self: True))
    chosen = engine.auto(20)._choices
    assert chosen == [0, *(nodes for nodes in TREE_NODES if nodes <= 20)]
