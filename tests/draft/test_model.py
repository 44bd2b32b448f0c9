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
from specdec.kernels.array import Backend
from specdec.kernels.weight import Weight
from tests.draft.reference import (
    BLOCK,
    CASES,
    HIDDEN,
    MLX,
    NUMPY,
    TAPS,
    TARGET,
    VOCAB,
    Reference,
    load_weights,
    make_draft,
)
from tests.drafts import draft_config, draft_tensors, write_draft


@pytest.fixture(params=["mlx", "numpy"])
def backend(request) -> Backend:
    if request.param == "numpy":
        pytest.importorskip("numba")
    return MLX if request.param == "mlx" else NUMPY


def extend(draft: Draft, taps: np.ndarray) -> None:
    draft.extend(draft.backend.place(mx.array(taps)))


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
def test_log_probs_are_those_of_the_formulas(case, context, backend):
    draft, reference = make_draft(case, backend=backend)
    taps = random_taps(context)
    extend(draft, taps)
    assert draft.length == context
    np.testing.assert_allclose(dense(draft, 17), reference.log_probs(taps, 17), atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_rounds_of_different_sizes_with_proposals_between(case, backend):
    """The block's rows leave no trace, and the cache holds what a fresh start would."""
    draft, reference = make_draft(case, 5, backend)
    taps = random_taps(45)
    at = 0
    for step, bonus in ((7, 1), (1, 2), (12, 3), (2, 4), (20, 5), (3, 6)):
        extend(draft, taps[at : at + step])
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
        extend(draft, taps[at : at + step])
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
    extend(whole, taps)
    pieces, _ = make_draft(case)
    for part in np.split(taps, sorted(cuts)):
        extend(pieces, part)
    np.testing.assert_allclose(dense(pieces, 9), dense(whole, 9), atol=1e-5)


def test_row_by_row():
    taps = random_taps(40)
    whole, _ = make_draft("sliding")
    extend(whole, taps)
    rows, _ = make_draft("sliding")
    for row in taps:
        extend(rows, row[None])
    np.testing.assert_allclose(dense(rows, 9), dense(whole, 9), atol=1e-5)


def test_proposing_changes_nothing_and_reset_forgets(backend):
    draft, _ = make_draft("sliding", backend=backend)
    extend(draft, random_taps(13))
    first = dense(draft, 4)
    draft.propose(99, 3)
    np.testing.assert_array_equal(dense(draft, 4), first)
    assert draft.length == 13
    draft.reset()
    assert draft.length == 0
    extend(draft, random_taps(13))
    np.testing.assert_array_equal(dense(draft, 4), first)


def test_narrow_proposals_are_the_top_of_wide_ones():
    draft, _ = make_draft("plain")
    extend(draft, random_taps(5))
    wide, narrow = draft.propose(4, VOCAB), draft.propose(4, 6)
    assert (narrow.slots, narrow.width) == (BLOCK - 1, 6)
    np.testing.assert_array_equal(narrow.tokens, wide.tokens[:, :6])
    np.testing.assert_array_equal(narrow.log_probs, wide.log_probs[:, :6])


@pytest.mark.parametrize("case", ["sliding", "plain"])
def test_memory_is_what_the_formula_says(case, backend):
    draft, _ = make_draft(case, backend=backend)
    for _ in range(60):
        extend(draft, random_taps(37))
        draft.propose(0, 1)
        held = sum(cache.rows.nbytes for cache in draft._caches)
        planned = cache_bytes(draft.config, draft.length, mx.float32)
        # A full layer is exactly as planned; a sliding one may not have reached its plan yet.
        assert held == planned if case == "plain" else held <= planned


def test_packed_weights_are_their_dequantized_values(tmp_path):
    """A packed draft under the target's packed embedding and head, also in bfloat16."""
    pytest.importorskip("numba")
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
        backends = (MLX, NUMPY, Backend("reference", mx.bfloat16, "test"))
        mlx, numpy, short = (
            Draft.load(checkpoint, config, embedding.on(backend), head.on(backend), backend)
            for backend in backends
        )
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
    assert mlx.weights.layers[0].qkv.weight(1).quantized
    expected = Reference(raw, tensors, unpacked(embedding), unpacked(head)).log_probs(taps, 5)
    for draft in (mlx, numpy, short):
        extend(draft, taps)
    np.testing.assert_allclose(dense(mlx, 5), expected, atol=1e-4)
    np.testing.assert_allclose(dense(numpy, 5), expected, atol=1e-4)
    error = np.abs(dense(short, 5) - expected)
    assert error.mean() < 0.1  # of values from -2 to -16


def test_float16_is_refused():
    draft, _ = make_draft("plain")
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        Draft(
            draft.config,
            draft.weights,
            draft.embedding,
            draft.head,
            Backend("reference", mx.float16, ""),
        )


def test_non_finite_numbers_name_the_layer():
    draft, _ = make_draft("plain")
    taps = random_taps(5)
    extend(draft, taps)
    bad = draft.weights.layers[1].down.data
    bad[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="layer 1 of the draft"):
        draft.propose(1, 2)
    taps[2, 7] = np.inf
    draft.reset()
    extend(draft, taps)
    with pytest.raises(NonFiniteError, match="layer 0 of the draft"):
        draft.propose(1, 2)


@pytest.mark.parametrize("rope", ["default", "yarn"])
def test_without_context_a_causal_draft_is_a_qwen3(rope):
    """transformers' Qwen3 as a second opinion on everything but the injected context."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    case: dict = {"dflash": {"causal": True}}
    if rope == "yarn":
        case |= {"rope_theta": None, "rope_parameters": CASES["yarn"]["rope_parameters"]}
    raw = draft_config(TARGET, block_size=BLOCK, **case)
    tensors = draft_tensors(raw, TAPS)
    config = DraftConfig.from_dict(raw)
    template, _ = make_draft("plain")
    draft = Draft(
        config, load_weights(config, tensors, MLX), template.embedding, template.head, MLX
    )
    options = {
        key: value
        for key, value in raw.items()
        if key not in ("architectures", "model_type", "dflash_config", "block_size")
    }
    options.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    qwen = transformers.Qwen3Model(transformers.Qwen3Config(**options)).eval()
    weights = {
        name: torch.tensor(values)
        for name, values in tensors.items()
        if name not in ("fc.weight", "hidden_norm.weight")
    }
    missing, surplus = qwen.load_state_dict(weights, strict=False)
    assert (missing, surplus) == (["embed_tokens.weight"], [])
    embedding, head = (np.array(w.data) for w in (template.embedding, template.head))
    tokens = [7] + [config.mask_token_id] * config.slots
    with torch.no_grad():
        hidden = qwen(inputs_embeds=torch.tensor(embedding[tokens])[None]).last_hidden_state[0]
        logits = hidden[1:] @ torch.tensor(head).T
        expected = torch.log_softmax(logits.double(), dim=-1).numpy()
    np.testing.assert_allclose(dense(draft, 7), expected, atol=1e-4)
