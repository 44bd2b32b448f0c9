"""What growing a session's buffers takes, and what it leaves."""

import mlx.core as mx
import numpy as np

from specdec.target.config import TargetConfig
from specdec.target.state import KV_STEP, State
from tests.backends import REFERENCE
from tests.checkpoints import tiny_config


def test_memory_holds_one_old_buffer_while_they_grow():
    raw = tiny_config("qwen3_moe", num_hidden_layers=16, head_dim=64)
    state = State(TargetConfig.from_dict(raw, "a test"), REFERENCE)
    state.make_room(4 * KV_STEP)
    for buffers in (state.keys, state.values):
        for layer, buffer in enumerate(buffers):
            buffers[layer] = buffer + layer
    mx.eval(state.keys, state.values)
    state.length = state.capacity
    del buffer

    mx.reset_peak_memory()
    state.make_room(1)
    mx.eval(state.keys, state.values)
    grown = state.keys[0].nbytes
    assert state.capacity == 5 * KV_STEP
    # the old one and what is put behind it are as large as the new one
    assert mx.get_peak_memory() - mx.get_active_memory() <= 1.25 * grown
    for buffers in (state.keys, state.values):
        for layer, buffer in enumerate(buffers):
            committed = np.array(buffer[:, : state.length])
            np.testing.assert_array_equal(committed, np.full_like(committed, layer))
