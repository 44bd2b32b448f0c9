"""Attention over runs of keys, on both backends, against a plain softmax in float64."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels.block_attention import block_attention


@settings(max_examples=60, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    rows=st.integers(1, 9),
    places=st.integers(1, 70),
    dim=st.sampled_from([4, 16, 64]),
    everything=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_against_a_softmax(kv_heads, group, rows, places, dim, everything, seed):
    pytest.importorskip("numba")
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((kv_heads * group, rows, dim)).astype(np.float32)
    # part of a larger buffer, as a cache hands it over
    buffers = rng.standard_normal((2, kv_heads, places + 5, dim)).astype(np.float32)
    keys, values = buffers[0, :, :places], buffers[1, :, :places]
    first, last = np.zeros(rows, int), np.full(rows, places)
    if not everything:
        first = rng.integers(0, places, rows)
        last = rng.integers(first + 1, places + 1)
    expected = np.empty(queries.shape)
    for head in range(len(queries)):
        for row in range(rows):
            seen = slice(first[row], last[row])
            scores = keys[head // group, seen].astype(np.float64) @ queries[head, row] * 0.3
            weights = np.exp(scores - scores.max())
            expected[head, row] = weights / weights.sum() @ values[head // group, seen]
    ours = block_attention(queries, keys, values, first, last, 0.3)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    arrays = (mx.array(a) for a in (queries, buffers[0], buffers[1]))
    q, k, v = arrays
    theirs = block_attention(q, k[:, :places], v[:, :places], first, last, 0.3)
    np.testing.assert_allclose(np.array(theirs), expected, atol=1e-5)


def test_the_whole_buffer_with_what_is_behind_it_masked(monkeypatch):
    """As on a GPU, where the number of keys must not change from round to round."""
    rng = np.random.default_rng(3)
    q, k, v = (mx.array(rng.standard_normal((2, n, 16)), mx.float32) for n in (3, 12, 12))
    first, last = np.array([0, 2, 5]), np.array([7, 7, 7])
    alone = block_attention(q, k[:, :7], v[:, :7], first, last, 0.3)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    np.testing.assert_allclose(block_attention(q, k, v, first, last, 0.3), alone, atol=1e-6)
