"""The draft's forward pass against a float64 NumPy implementation straight from the formulas."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.checkpoint import Checkpoint
from specdec.draft.cache import cache_bytes
from specdec.draft.config import DraftConfig
from specdec.draft.model import Draft
from specdec.errors import NonFiniteError
from specdec.kernels.weight import Weight
from tests.draft.reference import BLOCK, CASES, HIDDEN, TAPS, TARGET, VOCAB, Reference, make_draft
from tests.drafts import write_draft


def random_taps(rows: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, TAPS * HIDDEN)).astype(np.float32)


def dense(draft: Draft, bonus: int) -> np.ndarray:
    """propose()'s log-probabilities in the order of the ids: [slots, vocab]."""
    block = draft.propose(bonus, VOCAB)
    log_probs = np.empty((block.slots, VOCAB))
    np.put_along_axis(log_probs, block.tokens, block.log_probs, axis=1)
    return log_probs


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("context", [1, 4, 30])
def test_log_probs_are_those_of_the_formulas(case, context):
    draft, reference = make_draft(case)
    taps = random_taps(context)
    draft.extend(mx.array(taps))
    assert draft.length == context
    np.testing.assert_allclose(dense(draft, 17), reference.log_probs(taps, 17), atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_rounds_of_different_sizes_with_proposals_between(case):
    """The block's rows leave no trace, and the cache holds what a fresh start would."""
    draft, reference = make_draft(case, seed=5)
    taps = random_taps(45)
    at = 0
    for step, bonus in ((7, 1), (1, 2), (12, 3), (2, 4), (20, 5), (3, 6)):
        draft.extend(mx.array(taps[at : at + step]))
        at += step
        np.testing.assert_allclose(
            dense(draft, bonus), reference.log_probs(taps[:at], bonus), atol=1e-4
        )


@pytest.mark.parametrize("case", ["sliding", "narrow-causal-window", "plain"])
def test_growing_buffers_past_several_steps(case):
    draft, reference = make_draft(case)
    taps = random_taps(1100)
    rng = np.random.default_rng(9)
    at, checks = 0, 0
    while at < len(taps):
        step = int(rng.integers(1, 90))
        draft.extend(mx.array(taps[at : at + step]))
        at = min(at + step, len(taps))
        if at // 250 > checks:
            checks = at // 250
            np.testing.assert_allclose(
                dense(draft, at % VOCAB), reference.log_probs(taps[:at], at % VOCAB), atol=1e-4
            )
    assert checks == 4


@pytest.mark.parametrize("case", ["plain", "sliding", "window-of-one"])
@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(1, 59), max_size=8, unique=True))
def test_extending_at_once_or_in_pieces_is_the_same(case, cuts):
    taps = random_taps(60)
    whole, _ = make_draft(case)
    whole.extend(mx.array(taps))
    pieces, _ = make_draft(case)
    for part in np.split(taps, sorted(cuts)):
        pieces.extend(mx.array(part))
    np.testing.assert_allclose(dense(pieces, 9), dense(whole, 9), atol=1e-5)


def test_row_by_row():
    taps = random_taps(40)
    whole, _ = make_draft("sliding")
    whole.extend(mx.array(taps))
    rows, _ = make_draft("sliding")
    for row in taps:
        rows.extend(mx.array(row[None]))
    np.testing.assert_allclose(dense(rows, 9), dense(whole, 9), atol=1e-5)


def test_proposing_changes_nothing_and_reset_forgets():
    draft, _ = make_draft("sliding")
    draft.extend(mx.array(random_taps(13)))
    first = dense(draft, 4)
    draft.propose(99, 3)
    np.testing.assert_array_equal(dense(draft, 4), first)
    assert draft.length == 13
    draft.reset()
    assert draft.length == 0
    draft.extend(mx.array(random_taps(13)))
    np.testing.assert_array_equal(dense(draft, 4), first)


def test_narrow_proposals_are_the_top_of_wide_ones():
    draft, _ = make_draft("plain")
    draft.extend(mx.array(random_taps(5)))
    wide, narrow = draft.propose(4, VOCAB), draft.propose(4, 6)
    assert (narrow.slots, narrow.width) == (BLOCK - 1, 6)
    np.testing.assert_array_equal(narrow.tokens, wide.tokens[:, :6])
    np.testing.assert_array_equal(narrow.log_probs, wide.log_probs[:, :6])


@pytest.mark.parametrize("case", ["sliding", "plain"])
def test_memory_is_what_the_formula_says(case):
    draft, _ = make_draft(case)
    for _ in range(60):
        draft.extend(mx.array(random_taps(37)))
        draft.propose(0, 1)
        held = sum(array.nbytes for cache in draft._caches for array in cache.arrays)
        planned = cache_bytes(draft.config, draft.length, mx.float32)
        # A full layer is exactly as planned; a sliding one may not have reached its plan yet.
        assert held == planned if case == "plain" else held <= planned


def test_packed_weights_are_their_dequantized_values(tmp_path):
    """A packed draft under the target's packed embedding and head, also in bfloat16."""
    target = {**TARGET, "hidden_size": 64}
    write_draft(tmp_path, target, quantize=(4, 32), block_size=BLOCK, prefix="model.")
    rng = np.random.default_rng(0)

    def packed(scale: float) -> Weight:
        matrix = mx.array((scale * rng.standard_normal((VOCAB, 64))).astype(np.float32))
        return Weight(*mx.quantize(matrix, group_size=64, bits=8), 8, 64)

    def unpacked(weight: Weight) -> np.ndarray:
        assert weight.scales is not None
        matrix = mx.dequantize(
            weight.data,
            weight.scales,
            weight.biases,
            group_size=weight.group_size,
            bits=weight.bits,
        )
        return np.array(matrix).astype(np.float64)

    embedding, head = packed(1.0), packed(0.25)
    taps = rng.standard_normal((12, TAPS * 64)).astype(np.float32)
    with Checkpoint.open(tmp_path) as checkpoint:
        config = DraftConfig.from_dict(checkpoint.config)
        drafts = {
            dtype: Draft.load(checkpoint, config, embedding, head, dtype)
            for dtype in (mx.float32, mx.bfloat16)
        }
        tensors = {}
        for name in checkpoint.tensors:
            data = checkpoint.load(name, dtype=mx.float32)
            path, _, part = name.rpartition(".")
            if f"{path}.scales" in checkpoint.tensors:
                scales = checkpoint.load(f"{path}.scales", dtype=mx.float32)
                biases = checkpoint.load(f"{path}.biases", dtype=mx.float32)
                values = unpacked(Weight(data, scales, biases, 4, 32)) if part == "weight" else None
            else:
                values = np.array(data)
            if values is not None:
                tensors[name.removeprefix("model.")] = values
        raw = checkpoint.config
    assert drafts[mx.float32].weights.layers[0].q.quantized
    expected = Reference(raw, tensors, unpacked(embedding), unpacked(head)).log_probs(taps, 5)
    for draft in drafts.values():
        draft.extend(mx.array(taps))
    np.testing.assert_allclose(dense(drafts[mx.float32], 5), expected, atol=1e-4)
    error = np.abs(dense(drafts[mx.bfloat16], 5) - expected)
    assert error.mean() < 0.1  # of values from -2 to -16


def test_float16_is_refused():
    draft, _ = make_draft("plain")
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        Draft(draft.config, draft.weights, draft.embedding, draft.head, mx.float16)


def test_non_finite_numbers_name_the_layer():
    draft, _ = make_draft("plain")
    taps = random_taps(5)
    draft.extend(mx.array(taps))
    bad = draft.weights.layers[1].down.data
    bad[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="layer 1 of the draft"):
        draft.propose(1, 2)
    taps[2, 7] = np.inf
    draft.reset()
    draft.extend(mx.array(taps))
    with pytest.raises(NonFiniteError, match="layer 0 of the draft"):
        draft.propose(1, 2)
