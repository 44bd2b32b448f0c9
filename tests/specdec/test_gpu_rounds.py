"""Drafted rounds on the GPU kernels, run by the shim: what is begun ahead changes nothing."""

import json

import mlx.core as mx
import numpy as np
import pytest

from specdec.budget import Fixed
from specdec.checkpoint import Checkpoint
from specdec.draft.config import DraftConfig
from specdec.draft.model import Draft
from specdec.engine import Engine
from specdec.errors import NonFiniteError
from specdec.kernels.array import Backend
from specdec.kernels.gpu.in_place import write_in_place
from specdec.kernels.gpu.limits import MAX_ROWS, refused
from specdec.sampling import Sampling
from specdec.target.model import Target
from specdec.target.verify_graph import VerifyGraph
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


def knowing(engine: Engine, answer: list[int], monkeypatch) -> None:
    """The random draft's proposals are made, and then set right, sometimes by the second choice."""
    answered, rng = Draft.answer, np.random.default_rng(1)

    def known(self, bonus, width, slots=None):
        found = np.array(answered(self, bonus, width, slots))
        at, width = self.length - len(PROMPT) + 1, (found.shape[1] - 3) // 2
        tokens = found[:, :width].copy()
        for slot, token in enumerate(answer[at : at + len(tokens)]):
            place = int(rng.random() < 0.3)
            others = tokens[slot][tokens[slot] != token][: width - 1]
            tokens[slot] = np.insert(others, place, token)
        return mx.array(np.concatenate([tokens, found[:, width:]], axis=1))

    monkeypatch.setattr(Draft, "answer", known)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=3)], ids=str)
def test_rounds_of_all_budgets_are_plain_decoding(engine, sampling, monkeypatch):
    answer = [engine.prefill(PROMPT, False, sampling=sampling).token]
    while len(answer) < COUNT + 6:
        answer += engine.step(Fixed(1)).tokens
    knowing(engine, answer, monkeypatch)
    ahead = []
    for way in ("look_ahead", "look_past"):
        looked = getattr(Draft, way)

        def look(self, *ask, way=way, looked=looked):
            ahead.append(way)
            looked(self, *ask)

        monkeypatch.setattr(Draft, way, look)
    found = [engine.prefill(PROMPT, True, sampling=sampling).token]
    accepted = []
    grown, grow = [], Target.grow

    def grows(self, found, bonus, nodes):
        grown.append(nodes)
        return grow(self, found, bonus, nodes)

    monkeypatch.setattr(Target, "grow", grows)
    for budget in (3, 3, 1, 1, 5, 2):
        done = engine.step(Fixed(budget))
        accepted.append(done.accepted)
        found += done.tokens
        assert engine.draft.length + engine._untold_rows() == engine.target.length
    assert found == answer[: len(found)]
    assert sum(accepted) > 2
    # after each drafted round, by the device's own walk where tokens are not drawn
    assert ahead == 4 * ["look_past" if sampling.greedy else "look_ahead"]
    assert grown == ([3, 3, 5, 2] if sampling.greedy else [])


def test_with_and_without_looking_ahead_everything_is_the_same(engine, monkeypatch):
    """Tokens, trees, the target's state and the draft's answers, to the bit; also where a round
    fails and is run again, and where another prompt comes."""
    found = []
    for ahead in ("grown", "look_past", "look_ahead", ""):
        ahead_, past, grows = Engine._look_ahead, Engine._look_past, Engine._grows
        if ahead != "grown":
            monkeypatch.setattr(Engine, "_grows", lambda *ask: False)
        if ahead not in ("grown", "look_past"):
            monkeypatch.setattr(Engine, "_look_past", lambda *ask: False)
        if not ahead:
            monkeypatch.setattr(Engine, "_look_ahead", lambda *ask: None)
        engine.prefill(PROMPT)
        rounds = [engine.step(Fixed(3)) for _ in range(2)]
        assert (engine.draft._begun is not None) == bool(ahead)
        commit = engine.target.commit

        def fails(path, commit=commit):
            monkeypatch.setattr(engine.target, "commit", commit)
            raise NonFiniteError("a test")

        monkeypatch.setattr(engine.target, "commit", fails)
        with pytest.raises(NonFiniteError, match="a test"):
            engine.step(Fixed(3))
        rounds += [engine.step(Fixed(3)), engine.step(Fixed(2))]
        state = state_bytes(engine.target)
        engine.prefill(PROMPT[:-1])
        rounds.append(engine.step(Fixed(3)))
        block = engine.draft.propose(5, 3)
        words = [
            (r.tokens, r.tree.tokens.tolist(), r.tree.parents.tolist(), r.told) for r in rounds
        ]
        found.append((words, state, block.log_probs.tobytes()))
        monkeypatch.setattr(Engine, "_look_past", past)
        monkeypatch.setattr(Engine, "_look_ahead", ahead_)
        monkeypatch.setattr(Engine, "_grows", grows)
    assert found == found[:1] * 4


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
