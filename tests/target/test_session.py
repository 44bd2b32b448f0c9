"""Prefill, verify and commit: what is committed, what is not, and that trees are decoding.

Every comparison with decoding is to the bit, logits and state.
"""

import errno
import os

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import checkpoint as checkpoint_module
from specdec.errors import ExpertReadError, NonFiniteError
from specdec.kernels.array import to_numpy
from specdec.target import layers as layers_module
from tests.backends import CPU, REFERENCE, each_backend, each_exact_backend, needs_numba, same_bits
from tests.checkpoints import FAMILIES, write_checkpoint
from tests.targets import (
    load_target,
    logits_of,
    opened,
    prefill,
    rewrite,
    state_bytes,
    step,
    tree_of,
)
from tests.trees import path_to, random_parents

VOCAB = 320
PROMPT = np.random.default_rng(7).integers(0, VOCAB, 40).tolist()
FEW = {"pins": 1, "slots": 3}  # most passes need several waves


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("targets")
    made = {(f, "4bit"): write_checkpoint(root / f"{f}-4", f) for f in FAMILIES}
    dense = {(f, "dense"): write_checkpoint(root / f"{f}-d", f, quantize=None) for f in FAMILIES}
    return made | dense


@pytest.fixture(scope="module")
def sessions(folders):
    """Loaded targets, by family, packing and backend; whoever takes one resets it."""
    loaded = {}

    def take(family, packing, backend, **options):
        key = (family, packing, backend.name, *options.items())
        if key not in loaded:
            loaded[key] = load_target(folders[family, packing], backend, **options)
        loaded[key].reset()
        return loaded[key]

    yield take
    for target in loaded.values():
        target.experts.store.checkpoint.close()


def random_tree(rng, rows):
    return tree_of(rng.integers(0, VOCAB, rows), random_parents(rng, rows))


@each_exact_backend
@pytest.mark.parametrize("packing", ["4bit", "dense"])
@pytest.mark.parametrize("family", FAMILIES)
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.one_of(st.sampled_from([1, 2, 62, 63, 64, 65]), st.integers(1, 70)),
    rows=st.integers(1, 14),
)
@settings(max_examples=4, deadline=None)
def test_a_tree_is_decoding_its_paths(family, packing, backend, sessions, seed, length, rows):
    """Then a path is committed, and decoding goes on from the same state."""
    rng = np.random.default_rng(seed)
    prompt = rng.integers(0, VOCAB, length).tolist()
    tree = random_tree(rng, rows)
    path = path_to(tree.parents, int(rng.integers(rows)))
    tokens = rng.integers(0, VOCAB, 2)

    target = sessions(family, packing, backend, taps=(0, 3))
    target.prefill(prompt)
    before = state_bytes(target)
    output = target.verify(tree)
    logits, taps = logits_of(output), to_numpy(output.taps)
    assert taps.shape == (rows, 2 * 64)
    assert state_bytes(target) == before
    target.commit(path)
    committed = state_bytes(target)
    after = [step(target, token) for token in tokens]
    end = state_bytes(target)

    target = sessions(family, packing, backend, **FEW, taps=(0, 3))
    target.prefill(prompt)
    assert state_bytes(target) == before
    for row in path:
        alone = target.verify(tree_of(tree.tokens[[row]], [-1]))
        target.commit([0])
        assert same_bits(logits_of(alone)[0], logits[row])
        assert same_bits(to_numpy(alone.taps)[0], taps[row])
    assert state_bytes(target) == committed
    assert all(same_bits(step(target, t), row) for t, row in zip(tokens, after, strict=True))
    assert state_bytes(target) == end


@each_backend
@pytest.mark.parametrize("way", ["a failed verify", "reset", "a commit"])
def test_only_the_last_verified_tree_can_be_committed(backend, way, sessions, monkeypatch):
    target = sessions("qwen3_next", "4bit", backend)
    target.prefill(PROMPT)
    target.verify(tree_of([1, 2, 3], [-1, 0, 0]))
    if way == "a failed verify":

        def broken(tokens, weight):
            raise ExpertReadError("no")

        tree = tree_of([4, 5], [-1, 0])
        with monkeypatch.context() as patch:
            patch.setattr(layers_module, "embed", broken)
            with pytest.raises(ExpertReadError):
                target.verify(tree)
    elif way == "reset":
        target.reset()
        target.prefill(PROMPT)
    else:
        target.commit([0])
    before = state_bytes(target)
    with pytest.raises(AssertionError, match="commit without a verified tree"):
        target.commit([0, 1])
    assert state_bytes(target) == before


@each_exact_backend
@pytest.mark.parametrize("family", FAMILIES)
def test_rounds_of_trees_leave_the_state_of_decoding(family, backend, sessions):
    """Many rounds, past the first block of keys and the first growth of their buffers."""
    rng = np.random.default_rng(3)
    prompt = rng.integers(0, VOCAB, 240).tolist()
    target = sessions(family, "4bit", backend)
    target.prefill(prompt)
    tokens: list[int] = []
    while len(tokens) < 30:
        tree = random_tree(rng, int(rng.integers(1, 20)))
        path = path_to(tree.parents, int(rng.integers(tree.rows)))
        target.verify(tree)
        target.commit(path)
        tokens += tree.tokens[path].tolist()
    state, length = state_bytes(target), target.length
    assert length == 240 + len(tokens) > 256
    target.reset()
    target.prefill(prompt)
    for token in tokens:
        step(target, token)
    assert target.length == length
    assert state_bytes(target) == state


@needs_numba
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_has_the_same_bits_in_any_chunks(family, sessions):
    target = sessions(family, "4bit", CPU, taps=(1,))
    whole = target.prefill(PROMPT, all_logits=True)
    logits, taps, state = logits_of(whole), to_numpy(whole.taps), state_bytes(target)
    for chunk in (1, 3, 16, 39, 40, 100):
        target.reset()
        output = prefill(target, PROMPT, chunk, all_logits=True)
        assert same_bits(logits_of(output), logits)
        assert same_bits(to_numpy(output.taps), taps)
        assert state_bytes(target) == state
    target.reset()
    assert same_bits(logits_of(prefill(target, PROMPT, 7)), logits[-1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_of_the_reference_is_close_in_any_chunks(family, sessions):
    target = sessions(family, "4bit", REFERENCE, taps=(1,))
    whole = target.prefill(PROMPT, all_logits=True)
    for chunk in (1, 3, 17, 39, 100):
        target.reset()
        output = prefill(target, PROMPT, chunk, all_logits=True)
        np.testing.assert_allclose(logits_of(output), logits_of(whole), atol=1e-4)
        np.testing.assert_allclose(to_numpy(output.taps), to_numpy(whole.taps), atol=1e-4)


@each_backend
def test_prefill_taps_every_row(backend, sessions):
    target = sessions("qwen3_next", "4bit", backend, taps=(0, 2, 3))
    output = target.prefill(PROMPT)
    assert output.taps.shape == (40, 3 * 64)
    assert output.logits.shape == (1, VOCAB)
    assert target.length == 40


@each_backend
@pytest.mark.parametrize("family", FAMILIES)
def test_verify_commits_nothing(family, backend, sessions):
    """Trees that are thrown away leave no trace in what a later one computes and commits."""
    rng = np.random.default_rng(1)
    target = sessions(family, "4bit", backend)
    target.prefill(PROMPT)
    before = state_bytes(target)
    tree = random_tree(rng, 9)
    path = path_to(tree.parents, 8)
    expected = logits_of(target.verify(tree))
    target.commit(path)
    committed = state_bytes(target)
    assert committed != before

    target.reset()
    target.prefill(PROMPT)
    for rows in (25, 1, 12):
        target.verify(random_tree(rng, rows))
        assert state_bytes(target) == before
    assert same_bits(logits_of(target.verify(tree)), expected)
    target.commit(path)
    assert state_bytes(target) == committed


@each_backend
def test_commit_needs_a_verified_tree_and_a_path_of_it(backend, sessions):
    target = sessions("qwen3_next", "4bit", backend)
    with pytest.raises(AssertionError):
        target.commit([0])
    target.prefill(PROMPT[:5])
    with pytest.raises(AssertionError):
        target.commit([0])
    for path in ([1], [0, 2], [0, 2, 1]):
        target.verify(tree_of([1, 2, 3], [-1, 0, 1]))
        before = state_bytes(target)
        with pytest.raises(AssertionError):
            target.commit(path)
        assert state_bytes(target) == before
    target.verify(tree_of([1], [-1]))
    target.commit([0])
    with pytest.raises(AssertionError):
        target.commit([0])


class Failing:
    """Stands for the one function that reads weights; fails from the nth call on."""

    def __init__(self, monkeypatch, calls: int) -> None:
        self.left, self.real = calls, checkpoint_module.read_at
        self.patch = monkeypatch
        monkeypatch.setattr(checkpoint_module, "read_at", self)

    def __call__(self, descriptor, buffer, offset):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self.real(descriptor, buffer, offset)

    def heal(self) -> None:
        self.patch.setattr(checkpoint_module, "read_at", self.real)


@each_exact_backend
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("calls", [0, 7, 40])
def test_a_read_error_amid_verify_changes_nothing(family, backend, calls, folders, monkeypatch):
    rng = np.random.default_rng(2)
    tree = random_tree(rng, 12)
    path = path_to(tree.parents, 11)
    with opened(folders[family, "4bit"], backend) as whole:
        whole.prefill(PROMPT)
        expected = logits_of(whole.verify(tree))
        whole.commit(path)
        committed = state_bytes(whole)
        fresh = logits_of(whole.prefill(PROMPT[:9]))

    with opened(folders[family, "4bit"], backend, pins=0, slots=6) as target:
        target.prefill(PROMPT)
        before = state_bytes(target)
        failing = Failing(monkeypatch, calls)
        with pytest.raises(ExpertReadError, match=r"model\.safetensors: reading .* at byte"):
            target.verify(tree)
        assert state_bytes(target) == before
        with pytest.raises(AssertionError):
            target.commit([0])  # nothing is pending
        failing.heal()
        assert same_bits(logits_of(target.verify(tree)), expected)
        target.commit(path)
        assert state_bytes(target) == committed
        assert same_bits(logits_of(target.prefill(PROMPT[:9])), fresh)


@each_backend
def test_a_read_error_amid_prefill_leaves_the_target_usable(backend, folders, monkeypatch):
    with opened(folders["qwen3_5_moe", "4bit"], backend, pins=0, slots=4) as target:
        expected = logits_of(prefill(target, PROMPT, 16))
        target.reset()
        failing = Failing(monkeypatch, 30)
        with pytest.raises(ExpertReadError):
            prefill(target, PROMPT, 16)
        assert target.length % 16 == 0
        failing.heal()
        target.reset()
        assert same_bits(logits_of(prefill(target, PROMPT, 16)), expected)


# tensor -> what the error has to name
BROKEN = {
    "layers.2.linear_attn.in_proj_qkv.scales": r"layer 2 \(linear_attention\)",
    "layers.1.linear_attn.conv1d.weight": r"layer 1 \(linear_attention\)",
    "layers.0.linear_attn.A_log": r"layer 0 \(linear_attention\)",
    "layers.1.linear_attn.norm.weight": r"layer 1 \(linear_attention\)",
    "layers.2.input_layernorm.weight": r"layer 2 \(linear_attention\)",
    "layers.3.self_attn.k_proj.biases": r"layer 3 \(full_attention\)",
    "layers.3.self_attn.q_norm.weight": r"layer 3 \(full_attention\)",
    "layers.3.self_attn.o_proj.scales": r"layer 3 \(full_attention\)",
    "layers.1.mlp.gate.scales": r"layer 1 \(feed-forward\)",
    "layers.2.mlp.shared_expert.up_proj.scales": r"layer 2 \(feed-forward\)",
    "layers.0.mlp.shared_expert_gate.biases": r"layer 0 \(feed-forward\)",
    "layers.2.mlp.switch_mlp.down_proj.scales": r"layer 2 \(feed-forward\)",
    "layers.3.post_attention_layernorm.weight": r"layer 3 \(feed-forward\)",
    "embed_tokens.scales": "token embeddings",
    "model.norm.weight": "logits",
    "lm_head.biases": "logits",
}


def broken_by(folder, tensor: str, value: float):
    """Plant a value in the whole of one tensor, so that every token meets it."""

    def change(tensors):
        (name,) = [name for name in tensors if name.endswith(tensor)]
        tensors[name] = mx.full(tensors[name].shape, value, tensors[name].dtype)

    rewrite(folder, change)
    return folder


@each_backend
@pytest.mark.parametrize("tensor", BROKEN)
def test_nan_in_a_weight_is_named_by_its_layer(tensor, backend, tmp_path):
    folder = broken_by(write_checkpoint(tmp_path, "qwen3_5_moe"), tensor, np.nan)
    with opened(folder, backend, **FEW) as target:
        for chunk in (256, 3):
            with pytest.raises(NonFiniteError, match=BROKEN[tensor]):
                prefill(target, PROMPT[:8], chunk)
            assert target.length == 0


@each_backend
@pytest.mark.parametrize(
    "tensor", ["3.self_attn.v_proj.scales", "1.mlp.switch_mlp.up_proj.biases", "lm_head.scales"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_inf_in_a_weight_never_ends_smoothly(family, tensor, backend, tmp_path):
    folder = broken_by(write_checkpoint(tmp_path, family), tensor, np.inf)
    where = "logits" if "lm_head" in tensor else f"layer {tensor[0]} "
    with opened(folder, backend, **FEW) as target, pytest.raises(NonFiniteError, match=where):
        target.prefill(PROMPT[:8])


@each_backend
@pytest.mark.parametrize("layer", [0, 3])
def test_nan_that_only_a_drafted_token_meets(layer, backend, tmp_path):
    """Embedding row 5 is broken: plain decoding would never read it, so a path without token 5 is
    committed, with the bits it would have alone, and a path with it is refused."""
    folder = write_checkpoint(tmp_path, "qwen3_5_moe", quantize=None)

    def change(tensors):
        name = "language_model.model.embed_tokens.weight"
        values = np.array(tensors[name].astype(mx.float32))
        values[5] = np.nan
        tensors[name] = mx.array(values).astype(mx.bfloat16)

    rewrite(folder, change)
    with opened(folder, backend, **FEW) as target:
        target.prefill([1, 2, 3])
        before = state_bytes(target)
        target.verify(tree_of([4, 5, 6], [-1, 0, 0]))
        with pytest.raises(NonFiniteError, match="token embeddings"):
            target.commit([0, 1])
        assert state_bytes(target) == before
        target.verify(tree_of([4, 5, 6], [-1, 0, 0]))
        target.commit([0, 2])
        with_a_bad_sibling = state_bytes(target)
        target.reset()
        target.prefill([1, 2, 3])
        target.verify(tree_of([4, 6], [-1, 0]))
        target.commit([0, 1])
        assert state_bytes(target) == with_a_bad_sibling


@each_backend
def test_nan_in_a_prompt_row_is_found_wherever_the_row_stands(backend, tmp_path):
    """The first chunks and the rows before the last have no logits to show it."""
    folder = write_checkpoint(tmp_path, "qwen3_moe", quantize=None)

    def change(tensors):
        values = np.array(tensors["model.embed_tokens.weight"].astype(mx.float32))
        values[5] = np.nan
        tensors["model.embed_tokens.weight"] = mx.array(values).astype(mx.bfloat16)

    rewrite(folder, change)
    for place in (0, 4, 7):
        prompt = PROMPT[:8]
        prompt = [token if token != 5 else 6 for token in prompt]
        prompt[place] = 5
        for chunk in (3, 256):
            with (
                opened(folder, backend) as target,
                pytest.raises(NonFiniteError, match="token embeddings"),
            ):
                prefill(target, prompt, chunk)


@each_backend
def test_nan_in_the_last_layer_alone_is_found_before_the_draft_sees_it(backend, tmp_path):
    """An expert that the last row does not use: its logits are clean, another row's tap is not."""
    folder = write_checkpoint(tmp_path, "qwen3_moe", quantize=None)
    with opened(folder, backend, pins=0, slots=32) as target:
        target.prefill(PROMPT[:1])
        used = set(target.experts.resident(3).tolist())
        target.reset()
        target.prefill(PROMPT[:8])
        (expert, *_) = set(target.experts.resident(3).tolist()) - used

    def change(tensors):
        name = "model.layers.3.mlp.switch_mlp.down_proj.weight"
        values = np.array(tensors[name].astype(mx.float32))
        values[expert] = np.nan
        tensors[name] = mx.array(values).astype(mx.bfloat16)

    rewrite(folder, change)
    with opened(folder, backend, taps=(3,)) as target:
        # the first token last: it does not use the expert, for a row's own token decides most
        found = 0
        for last in range(8):
            prompt = [*PROMPT[:8], PROMPT[last]]
            target.reset()
            try:
                output = target.prefill(prompt)
            except NonFiniteError as error:
                assert "layer 3 (feed-forward)" in str(error)  # noqa: PT017
                found += 1
            else:
                assert np.isfinite(to_numpy(output.taps)).all()
        assert found == 8
