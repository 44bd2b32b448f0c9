"""Drafted rounds on the GPU kernels, run by the shim: what is begun ahead changes nothing."""

import json

import mlx.core as mx
import numpy as np
import pytest

from specdec.ahead import Ahead
from specdec.budget import Fixed
from specdec.checkpoint import Checkpoint
from specdec.choose import Greedy
from specdec.cost_curve import CostCurve
from specdec.draft.config import DraftConfig
from specdec.draft.graph import Drafted, DraftGraph
from specdec.draft.model import Draft
from specdec.engine import Engine
from specdec.errors import NonFiniteError
from specdec.kernels.array import Backend
from specdec.kernels.gpu.in_place import write_in_place
from specdec.kernels.gpu.limits import MAX_ROWS, refused
from specdec.kernels.walked import LENGTH
from specdec.overlap import Overlap
from specdec.round import PhaseSeconds, Round
from specdec.sampling import GREEDY, Sampling
from specdec.target.commit_graph import CommitGraph
from specdec.target.model import Target
from specdec.target.verify_graph import VerifyGraph
from specdec.tree.draft_tree import DraftTree
from tests.checkpoints import FAMILIES, write_checkpoint
from tests.drafts import write_draft
from tests.graphs import graphs_on_shim
from tests.metal.build import compiler
from tests.targets import load_target, state_bytes

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")

GPU = Backend("metal", mx.float32, "a test asked for it")
PROMPT = np.random.default_rng(3).integers(0, 320, MAX_ROWS + 8).tolist()
COUNT = 8


@pytest.fixture
def on_shim():
    with graphs_on_shim(), write_in_place():
        yield


@pytest.fixture
def engine(tmp_path, on_shim):
    folder = write_checkpoint(tmp_path / "target", FAMILIES[-1])
    raw = json.loads((folder / "config.json").read_text())
    drafts = write_draft(tmp_path / "draft", raw, head_dim=32, block_size=4)
    with Checkpoint.open(drafts) as checkpoint:
        config = DraftConfig.from_dict(checkpoint.config)
        target = load_target(folder, GPU, taps=config.target_layer_ids)
        draft = Draft.load(checkpoint, config, target.embedding, target.head, GPU)
    yield Engine(target, draft)
    target.experts.store.checkpoint.close()


def knowing(answer: list[int], monkeypatch) -> None:
    """The random draft's proposals are made, and then set right, sometimes by the second choice."""
    begin = DraftGraph.begin

    def known(self, caches, length, told, *ask):
        asked = begin(self, caches, length, told, *ask)
        after = length + (0 if told is None else len(told))
        if asked.came is not None:
            after = int(asked.came[LENGTH])
        found, at = np.array(asked.found), after - len(PROMPT) + 1
        width = (found.shape[1] - 3) // 2
        # sure of itself, so that trees are deep
        logits = -np.arange(width, dtype=np.float32)
        sums = [np.float32(0), np.exp(logits).sum()]
        found[:, width : 2 * width + 2] = np.array([*logits, *sums], np.float32).view(np.int32)
        for slot, token in enumerate(answer[at : at + len(found)]):
            tokens = found[slot, :width]
            others = tokens[tokens != token][: width - 1]
            found[slot, :width] = np.insert(others, int((at + slot) % 3 == 0), token)
        return Drafted(mx.array(found), asked.came)

    monkeypatch.setattr(DraftGraph, "begin", known)


def answer_of(engine: Engine, sampling: Sampling = GREEDY) -> list[int]:
    first = engine.prefill(PROMPT, False, sampling=sampling).token
    assert first is not None
    found = [first]
    while len(found) < COUNT + 12:
        found += engine.step(Fixed(1)).tokens
    return found


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=3)], ids=str)
def test_rounds_of_all_budgets_are_plain_decoding(engine, sampling, monkeypatch):
    answer = answer_of(engine, sampling)
    knowing(answer, monkeypatch)
    ahead = []
    for way in ("look_ahead", "look_past"):
        looked = getattr(Draft, way)

        def look(self, *ask, way=way, looked=looked):
            ahead.append(way)
            return looked(self, *ask)

        monkeypatch.setattr(Draft, way, look)
    found = [engine.prefill(PROMPT, True, sampling=sampling).token]
    accepted = []
    grown, grow = [], Target.grow

    def grows(self, found, nodes, bonus):
        grown.append(nodes)
        return grow(self, found, nodes, bonus)

    monkeypatch.setattr(Target, "grow", grows)
    begun, begin = [], Target._begin_grown

    def begins(self, tree, state, ahead=False):
        begun.append(ahead)
        return begin(self, tree, state, ahead)

    monkeypatch.setattr(Target, "_begin_grown", begins)
    for budget in (3, 3, 1, 1, 5, 2):
        done = engine.step(Fixed(budget))
        accepted.append(done.accepted)
        found += done.tokens
        assert engine.draft.length + engine._untold_rows() == engine.target.length
    assert found == answer[: len(found)]
    assert sum(accepted) > 2
    # after each drafted round, by the device's own walk where tokens are not drawn
    assert ahead == 4 * ["look_past" if sampling.greedy else "look_ahead"]
    # the second round's tree was grown ahead
    assert grown == ([3, 5, 2] if sampling.greedy else [])
    # and verified: that pass was taken, not begun anew
    assert begun == ([False, True, True, False, True, False, True] if sampling.greedy else [])


def test_with_and_without_looking_ahead_everything_is_the_same(engine, monkeypatch):
    """Tokens, trees, the target's state and the draft's answers, to the bit; also where a round
    fails and is run again, and where another prompt comes."""
    found = []
    knowing(answer_of(engine), monkeypatch)
    for ahead in ("followed", "grown", "look_past", "look_ahead", ""):
        follow, grows = Target.look_past, Ahead.can_grow
        past, ahead_ = Ahead.look_past, Ahead.look_ahead
        if ahead != "followed":
            monkeypatch.setattr(Target, "look_past", lambda *ask: None)
        if ahead not in ("followed", "grown"):
            monkeypatch.setattr(Ahead, "can_grow", lambda *ask: False)
        if ahead in ("look_ahead", ""):
            monkeypatch.setattr(Ahead, "look_past", lambda *ask: False)
        if not ahead:
            monkeypatch.setattr(Ahead, "look_ahead", lambda *ask: None)
        engine.prefill(PROMPT)
        rounds = [engine.step(Fixed(7)) for _ in range(3)]
        assert (engine.draft._begun is not None) == bool(ahead)
        commit = engine.target.commit

        def fails(path, commit=commit):
            monkeypatch.setattr(engine.target, "commit", commit)
            raise NonFiniteError("a test")

        monkeypatch.setattr(engine.target, "commit", fails)
        with pytest.raises(NonFiniteError, match="a test"):
            engine.step(Fixed(7))
        rounds += [engine.step(Fixed(7)), engine.step(Fixed(2))]
        state = state_bytes(engine.target)
        engine.prefill(PROMPT[:-1])
        rounds.append(engine.step(Fixed(3)))
        block = engine.draft.propose(5, 3)
        words = [
            (r.tokens, r.tree.tokens.tolist(), r.tree.parents.tolist(), r.path, r.told)
            for r in rounds
        ]
        found.append((words, state, block.log_probs.tobytes()))
        monkeypatch.setattr(Target, "look_past", follow)
        monkeypatch.setattr(Ahead, "can_grow", grows)
        monkeypatch.setattr(Ahead, "look_past", past)
        monkeypatch.setattr(Ahead, "look_ahead", ahead_)
    assert found == found[:1] * 5
    paths = [list(path) for *_, path, _ in found[0][0]]
    assert max(map(len, paths)) > 2
    assert any(path != list(range(len(path))) for path in paths)  # rows were moved


class Script:
    """The limits of rounds, and which plain ones begin the next one's pass, right or wrong."""

    def __init__(self, rounds: list[tuple[int, bool]]) -> None:
        self.rounds = iter(rounds)
        self.stays = False

    def limit(self) -> int:
        limit, self.stays = next(self.rounds)
        return limit

    def stays_plain(self) -> bool:
        return self.stays

    def cut(self, tree: DraftTree) -> DraftTree:
        return tree

    def learn(self, done: Round) -> None:
        pass


def test_plain_rounds_among_drafted_ones_begin_the_next_one(engine, monkeypatch):
    answer = answer_of(engine)
    knowing(answer, monkeypatch)
    passes, begin = [], Target._begin

    def begins(self, tokens, this):
        passes.append(this.tree.rows)
        return begin(self, tokens, this)

    found = [engine.prefill(PROMPT).token]
    monkeypatch.setattr(Target, "_begin", begins)
    rounds = [(1, True), (1, True), (1, False), (3, False), (1, False), (1, True), (3, True)]
    script, edges = Script([*rounds, (1, True), (1, True)]), []
    for _ in range(len(rounds) + 2):
        done = engine.step(script)
        found += done.tokens
        edges.append((done.begun_before, done.begins_next))
    assert found == answer[: len(found)]
    # one that is begun in vain: the second drafted round finds it there
    assert passes == [1, 1, 1, 4, 1, 1, 1, 4, 1, 1, 1]
    first, among, last, lone = (False, True), (True, True), (True, False), (False, False)
    assert edges == [first, among, last, lone, lone, first, lone, first, among]
    left = state_bytes(engine.target)
    length = engine.target.length
    engine.prefill(PROMPT, drafting=False)
    while engine.target.length < length:
        engine.step(Fixed(1))
    assert state_bytes(engine.target) == left


def test_auto_knows_what_plain_decoding_costs_where_passes_are_begun_ahead(engine, monkeypatch):
    answer = answer_of(engine)
    auto = engine.auto(4)
    lone, among = [], []
    add, learn = CostCurve.add, Overlap.learn

    def adds(self, rows, *given):
        lone.append((rows, auto.costs.plain_rounds))
        add(self, rows, *given)

    def learns(self, done, seconds):
        among.append(done)
        assert seconds == auto.costs.plain(done.context + 1)
        learn(self, done, seconds)

    monkeypatch.setattr(CostCurve, "add", adds)
    monkeypatch.setattr(Overlap, "learn", learns)
    found = [engine.prefill(PROMPT).token]
    auto.begin()
    while len(found) < len(answer):
        found += engine.step(auto).tokens
    assert found[: len(answer)] == answer
    # three passes by themselves, of which none begins another, then rounds that do
    assert lone[:3] == [(1, 0), (1, 1), (1, 2)]
    assert len(among) >= 3
    assert all(done.budget == 1 and done.begun_before and done.begins_next for done in among)


def test_what_is_begun_ahead_counts_to_the_phase_it_belongs_to(engine, monkeypatch):
    now = 0.0

    def takes(seconds, owner, name):
        step = getattr(owner, name)

        def longer(*given):
            nonlocal now
            now += seconds
            return step(*given)

        monkeypatch.setattr(owner, name, longer)

    monkeypatch.setattr("specdec.round.perf_counter", lambda: now)
    takes(1, Draft, "answer")
    takes(2, Draft, "look_past")
    takes(4, Draft, "look_ahead")
    takes(10, Greedy, "grow")
    takes(100, Target, "verify")
    takes(200, Target, "look_past")
    takes(400, Target, "look_ahead")
    takes(1000, Target, "commit")
    engine.prefill(PROMPT)
    assert engine.step(Fixed(3)).seconds == PhaseSeconds(3, 0, 300, 1000)
    assert engine.step(Fixed(3), "chain").seconds == PhaseSeconds(3, 10, 100, 1000)
    assert engine.step(Fixed(1)).seconds == PhaseSeconds(0, 0, 500, 1000)
    engine.prefill(PROMPT, sampling=Sampling(temperature=0.8, seed=3))
    assert engine.step(Fixed(3)).seconds == PhaseSeconds(5, 10, 100, 1000)
    engine.prefill(PROMPT, drafting=False)
    assert engine.step(Fixed(1)).seconds == PhaseSeconds(0, 0, 500, 1000)


def test_a_grown_tree_of_numbers_that_are_not_finite_is_an_error_that_names_the_layer(engine):
    engine.prefill(PROMPT)
    weights = engine.draft.weights.layers[1].down.data
    weights[3, 3] = float("nan")
    before = state_bytes(engine.target)
    with pytest.raises(NonFiniteError, match="layer 1 of the draft"):
        engine.step(Fixed(3))
    assert state_bytes(engine.target) == before


def test_a_grown_tree_is_verified_without_its_graph_where_a_kernel_refuses(engine, monkeypatch):
    engine.prefill(PROMPT)
    expected = engine.step(Fixed(3))
    engine.prefill(PROMPT)
    trace = VerifyGraph._trace

    def refuse(*given):
        refused["of a test"] = None
        return trace(*given)

    engine.target._graph.clear()
    monkeypatch.setattr(VerifyGraph, "_trace", refuse)
    done = engine.step(Fixed(3))
    refused.clear()
    assert (done.tokens, done.path) == (expected.tokens, expected.path)
    np.testing.assert_array_equal(done.tree.parents, expected.tree.parents)


def test_a_round_that_fails_anywhere_is_run_again(engine, monkeypatch):
    """After each step of it that looks ahead; and so where the round run again is plain."""
    answer = answer_of(engine)
    knowing(answer, monkeypatch)
    found = [engine.prefill(PROMPT).token]
    found += engine.step(Fixed(4)).tokens
    steps = [
        (Draft, "answer", 4),
        (Draft, "look_past", 4),
        (CommitGraph, "ahead", 1),
        (Target, "look_past", 4),
        (Target, "look_past", 1),
        (Ahead, "read", 3),
    ]
    for owner, name, budget in steps:
        with monkeypatch.context() as patch:
            step = getattr(owner, name)

            def fails(*given, step=step):
                step(*given)
                raise NonFiniteError("a test")

            patch.setattr(owner, name, fails)
            with pytest.raises(NonFiniteError, match="a test"):
                engine.step(Fixed(4))
        found += engine.step(Fixed(budget)).tokens
        if budget == 4:
            assert engine.target._ahead is not None
    assert found == answer[: len(found)]
    assert len(found) > 12
