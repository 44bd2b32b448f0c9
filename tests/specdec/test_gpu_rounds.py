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
from specdec.kernels.gpu.limits import MAX_ROWS
from specdec.sampling import Sampling
from specdec.tree.block import Block
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
    with graphs_on_shim():
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
    propose, rng = Draft.propose, np.random.default_rng(1)

    def known(self, bonus, width, slots=None):
        found = propose(self, bonus, width, slots)
        at = self.length - len(PROMPT) + 1
        tokens = found.tokens.copy()
        for slot, token in enumerate(answer[at : at + len(tokens)]):
            place = int(rng.random() < 0.3)
            others = tokens[slot][tokens[slot] != token][: width - 1]
            tokens[slot] = np.insert(others, place, token)
        return Block(tokens, found.log_probs)

    monkeypatch.setattr(Draft, "propose", known)


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
    for budget in (3, 3, 1, 1, 5, 2):
        done = engine.step(Fixed(budget))
        accepted.append(done.accepted)
        found += done.tokens
        assert engine.draft.length + engine._untold_rows() == engine.target.length
    assert found == answer[: len(found)]
    assert sum(accepted) > 2
    # after each drafted round, by the device's own walk where tokens are not drawn
    assert ahead == 4 * ["look_past" if sampling.greedy else "look_ahead"]


def test_with_and_without_looking_ahead_everything_is_the_same(engine, monkeypatch):
    """Tokens, trees, the target's state and the draft's answers, to the bit; also where a round
    fails and is run again, and where another prompt comes."""
    found = []
    for ahead in ("look_past", "look_ahead", ""):
        ahead_, past = Engine._look_ahead, Engine._look_past
        if ahead != "look_past":
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
            (r.tokens, r.tree.tokens.tolist(), r.tree.log_weights.tobytes(), r.told) for r in rounds
        ]
        found.append((words, state, block.log_probs.tobytes()))
        monkeypatch.setattr(Engine, "_look_past", past)
        monkeypatch.setattr(Engine, "_look_ahead", ahead_)
    assert found[0] == found[1] == found[2]
