"""Drafted rounds on the GPU kernels, run by the shim, whose buffers grow between what was begun
ahead and its commit; and the order of what is written in place, which the shim keeps by itself."""

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from specdec.budget import Fixed
from specdec.checkpoint import Checkpoint
from specdec.draft import cache
from specdec.draft.config import DraftConfig
from specdec.draft.model import Draft
from specdec.engine import Engine
from specdec.kernels.gpu.kernel import Launch
from specdec.kernels.written import Written
from specdec.target import state
from specdec.target.model import Target
from tests.checkpoints import FAMILIES, write_checkpoint
from tests.drafts import write_draft
from tests.metal.build import compiler
from tests.specdec.test_gpu_rounds import GPU, PROMPT, answer_of, knowing, on_shim
from tests.targets import load_target

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")

__all__ = ["on_shim"]


class Orders:
    """Which launches MLX, or a host that waited, has put before which."""

    def __init__(self) -> None:
        self.before: dict[int, set[int]] = {}  # by what a launch gave: it, and those before it
        self.waited: set[int] = set()
        self.last: dict[int, int] = {}  # by place in memory: the last launch that wrote there
        self.kept: list[mx.array] = []  # so that no other has their ids and places
        self.count = 0

    def launched(self, launch: Launch, inputs: tuple, outputs: list[mx.array]) -> None:
        names = launch.kernel.inputs
        order = inputs[names.index("order")]
        before = self.before.get(id(order), set()) | self.waited
        for name, array in zip(names, inputs, strict=True):
            place = np.array(array, copy=False).__array_interface__["data"][0]
            if name in launch.kernel.writes:
                last = self.last.get(place, self.count)
                assert last == self.count or last in before, (launch.kernel.name, name)
                self.last[place] = self.count
        for output in outputs:
            self.before[id(output)] = before | {self.count}
        self.kept += [*inputs, *outputs]
        self.count += 1


@pytest.fixture
def orders(on_shim, monkeypatch):
    orders, call, settle = Orders(), Launch.__call__, Written.settle

    def launched(self, *inputs):
        outputs = call(self, *inputs)
        staged = dict(self.template).get("STAGED", True)
        if self.kernel.writes and staged:
            orders.launched(self, inputs, outputs)
        return outputs

    def settled(self):
        orders.waited |= orders.before.get(id(self._last), set())
        settle(self)

    monkeypatch.setattr(Launch, "__call__", launched)
    monkeypatch.setattr(Written, "settle", settled)
    return orders


def test_buffers_that_grow_amid_what_was_begun_ahead(tmp_path, orders, monkeypatch):
    """Without gated delta layers; a window moves to the front of its buffer."""
    monkeypatch.setattr(state, "KV_STEP", 4)
    monkeypatch.setattr(cache, "STEP", 4)
    folder = write_checkpoint(tmp_path / "target", FAMILIES[0])
    raw = json.loads((folder / "config.json").read_text())
    kinds = ["sliding_attention", "full_attention"]
    options: dict[str, Any] = {"block_size": 3, "sliding_window": 6, "layer_types": kinds}
    drafts = write_draft(tmp_path / "draft", raw, head_dim=32, **options)
    with Checkpoint.open(drafts) as checkpoint:
        config = DraftConfig.from_dict(checkpoint.config)
        target = load_target(folder, GPU, taps=config.target_layer_ids)
        draft = Draft.load(checkpoint, config, target.embedding, target.head, GPU)
    engine, starts, ahead = Engine(target, draft), [], []
    answer = answer_of(engine)
    knowing(answer, monkeypatch)
    look_past = Target.look_past

    def look(self, *given):
        before = self.state.keys[0].shape[1]
        grown = look_past(self, *given)
        ahead.append(self.state.keys[0].shape[1] > before)
        return grown

    monkeypatch.setattr(Target, "look_past", look)
    found = [engine.prefill(PROMPT).token]
    for budget in (4, 4, 1, 4, 2):
        found += engine.step(Fixed(budget)).tokens
        starts.append(draft._caches[0].start)
    target.experts.store.checkpoint.close()
    assert found == answer[: len(found)]
    assert len(found) > 9
    assert any(ahead)  # the buffers of keys and values grew between a pass and its commit
    assert starts[-1] > starts[0]
    assert orders.count > 40
