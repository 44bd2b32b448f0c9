"""The context cache against a list of all rows, with buffers that grow and move often."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specdec.draft import cache as cache_module
from specdec.draft.cache import STEP, ContextCache, cache_bytes, capacity
from specdec.draft.config import DraftConfig
from tests.draft.reference import MLX, NUMPY
from tests.drafts import draft_config

BLOCK = 3


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setattr(cache_module, "STEP", 8)


def rows(first: int, count: int) -> tuple[mx.array, mx.array]:
    """Keys and values [2, count, 4] that say which position they belong to."""
    at = np.arange(first, first + count, dtype=np.float32)[None, :, None]
    keys = at + np.zeros((2, 1, 4), np.float32) + np.arange(2, dtype=np.float32)[:, None, None] / 4
    return mx.array(keys), mx.array(-keys)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    backend=st.sampled_from([MLX, NUMPY]),
    window=st.sampled_from([0, 1, 2, 5, 9, 20]),
    again=st.lists(st.booleans(), min_size=1, max_size=5),
    counts=st.lists(st.one_of(st.integers(1, 4), st.integers(1, 30)), min_size=1, max_size=40),
)
def test_every_row_in_sight_is_there(small_steps, window, counts, again, backend):
    cache = ContextCache(2, 4, BLOCK, window, backend)
    end = 0
    for count in counts:
        keep = cache.rows_to_keep(count)
        end += count
        keys, values = map(backend.place, rows(end - keep, keep))
        if again[end % len(again)]:  # a call that was cut off before its rows counted
            cache.append(keys, values, end - keep)
        cache.append(keys, values, end - keep)
        assert cache.end == end
        assert cache.start <= (max(end - window + 1, 0) if window else 0)
        keys, values = cache.with_block(*map(backend.place, rows(1000, BLOCK)))
        filled = end - cache.start + BLOCK
        held = np.array(keys)[:, :filled], np.array(values)[:, :filled]
        for part, (context, block) in zip(
            held,
            zip(rows(cache.start, end - cache.start), rows(1000, BLOCK), strict=True),
            strict=True,
        ):
            np.testing.assert_array_equal(part[:, :-BLOCK], np.array(context))
            np.testing.assert_array_equal(part[:, -BLOCK:], np.array(block))
        allocated = cache.rows.shape[2]
        assert end - cache.start + 2 * BLOCK <= allocated <= capacity(end, BLOCK, window)


def test_capacity():
    assert capacity(0, 8, 0) == STEP
    assert capacity(STEP - 16, 8, 0) == STEP
    assert capacity(STEP - 15, 8, 0) == 2 * STEP
    assert capacity(10**6, 16, 4096) == 4096 + 2 * STEP
    assert capacity(100, 16, 4096) == STEP


def test_bytes_of_all_layers():
    target = {
        "hidden_size": 64,
        "num_hidden_layers": 8,
        "vocab_size": 100,
        "max_position_embeddings": 4096,
    }
    config = DraftConfig.from_dict(
        draft_config(
            target,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=100,
        )
    )
    row = 2 * config.num_kv_heads * config.head_dim * 2
    expected = row * (capacity(5000, 8, 100) + capacity(5000, 8, 0))
    assert cache_bytes(config, 5000, mx.bfloat16) == expected


def test_memory_holds_one_old_buffer_while_those_of_all_layers_grow():
    caches = [ContextCache(2, 64, BLOCK, 0, MLX) for _ in range(16)]
    for cache in caches:
        full = mx.zeros((2, 4 * STEP - 2 * BLOCK, 64))
        cache.append(full, full, 0)
    mx.eval([cache.rows for cache in caches])
    mx.reset_peak_memory()
    for cache in caches:
        one = mx.zeros((2, 1, 64))
        cache.append(one, one, cache.end)
    mx.eval([cache.rows for cache in caches])
    assert [cache.rows.shape[2] for cache in caches] == 16 * [5 * STEP]
    # the old one and what is put behind it are as large as the new one
    assert mx.get_peak_memory() - mx.get_active_memory() <= 1.25 * caches[0].rows.nbytes
