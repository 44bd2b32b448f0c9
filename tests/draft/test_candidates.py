"""Top tokens of a slot against a full sort."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.draft.candidates import top_candidates
from specdec.errors import NonFiniteError


def full_sort(logits: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-logits, axis=1, kind="stable")[:, :width]
    wide = logits.astype(np.float64)
    log_probs = wide - np.log(np.exp(wide - wide.max()).sum(1, keepdims=True)) - wide.max()
    return order, np.take_along_axis(log_probs, order, 1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_against_a_full_sort_with_many_ties(data):
    vocab = data.draw(st.sampled_from([1, 5, 255, 256, 257, 512, 700, 3000]))
    width = data.draw(st.integers(1, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    levels = data.draw(st.sampled_from([1, 3, 50, 10**6]))
    logits = (rng.integers(0, levels, (3, vocab)) / 7).astype(np.float32)
    logits = np.minimum(logits, 40)
    place = data.draw(st.sampled_from([mx.array, np.array]))
    block = top_candidates(place(logits), width)
    tokens, log_probs = full_sort(logits, width)
    assert block.width == min(width, vocab)
    np.testing.assert_array_equal(block.tokens, tokens)
    np.testing.assert_allclose(block.log_probs, log_probs, atol=1e-4)
    assert block.tokens.dtype == np.int32
    assert block.log_probs.dtype == np.float64


@pytest.mark.parametrize("place", [mx.array, np.array])
def test_large_vocabulary(place):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((7, 248320)).astype(np.float32)
    block = top_candidates(place(logits), 24)
    tokens, log_probs = full_sort(logits, 24)
    np.testing.assert_array_equal(block.tokens, tokens)
    np.testing.assert_allclose(block.log_probs, log_probs, atol=1e-5)


@pytest.mark.parametrize("place", [mx.array, np.array])
def test_masked_tokens_have_probability_zero(place):
    block = top_candidates(place([[-np.inf, 0.0, -np.inf]]), 3)
    assert block.tokens.tolist() == [[1, 0, 2]]
    assert block.log_probs.tolist() == [[0.0, -np.inf, -np.inf]]


@pytest.mark.parametrize("place", [mx.array, np.array])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_logits_are_an_error(bad, place):
    logits = np.zeros((2, 300), np.float32)
    logits[1, 299] = bad
    with pytest.raises(NonFiniteError, match="draft"):
        top_candidates(place(logits), 2)
