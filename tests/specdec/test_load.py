"""Loading: everything that can be wrong is found before a weight is read; backends."""

import importlib.util
import json
import os
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from specdec import checkpoint as checkpoint_module
from specdec import load as load_module
from specdec.budget import Fixed
from specdec.errors import CheckpointError, PairingError, PlanError, SpecdecError
from specdec.generation import Request, generate
from specdec.kernels import array as array_module
from specdec.kernels.array import Backend, choose_backend
from specdec.kernels.gpu import tiles
from specdec.kernels.gpu.resident import moved
from specdec.load import Settings, load, plan_for
from specdec.memory import resident_bytes, start_gpu
from specdec.plan import KEPT_BYTES, KERNEL_PARTS, MemoryPlan
from tests.backends import needs_numba
from tests.checkpoints import FAMILIES, write_checkpoint
from tests.drafts import write_draft
from tests.pairs import Pair, write_pair
from tests.targets import rewrite

NUMBA = importlib.util.find_spec("numba") is not None
ON_GPU = mx.default_device() == mx.gpu


@pytest.fixture
def pair(tmp_path):
    return write_pair(tmp_path)


@pytest.fixture
def reads(monkeypatch):
    """Counts the reads of weights."""
    calls: list[int] = []
    real = checkpoint_module.read_at

    def counted(descriptor, buffer, offset):
        calls.append(len(buffer))
        return real(descriptor, buffer, offset)

    monkeypatch.setattr(checkpoint_module, "read_at", counted)
    return calls


def settings(pair: Pair, **changes) -> Settings:
    options: dict[str, Any] = {"model": str(pair.target), "draft": str(pair.draft)}
    return Settings(**{**options, "context": 256, **changes})


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_numba)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_runs_and_the_draft_changes_nothing(family, backend, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDEC_KERNELS", backend)
    pair = write_pair(tmp_path, family)
    plans: list[MemoryPlan] = []
    progress: list[tuple[int, int]] = []
    loaded = load(
        settings(pair, pin_layers=2, cache_slots=5),
        plans.append,
        lambda done, total: progress.append((done, total)),
    )
    assert plans == [loaded.plan]
    assert loaded.backend.name == backend
    assert loaded.plan.pinned == (0, 3)
    assert loaded.plan.slots == 5
    assert progress[-1][0] == progress[-1][1] > 0
    cache = loaded.engine.target.experts
    assert [cache.is_pinned(layer) for layer in range(4)] == [True, False, False, True]
    prompt = tuple(loaded.tokenizer.encode("a prompt", add_special=False))
    texts = [
        generate(loaded.engine, loaded.tokenizer, Request(prompt, budget, max_tokens=8))
        for budget in (1, 6)
    ]
    assert texts[0].tokens == texts[1].tokens
    loaded.engine.target.experts.store.checkpoint.close()


def test_a_target_alone(tmp_path):
    pair = write_pair(tmp_path)
    loaded = load(settings(pair, draft=None))
    assert loaded.engine.draft is None
    loaded.engine.prefill([1, 2, 3])
    loaded.engine.step(Fixed(1))
    with pytest.raises(SpecdecError, match="needs a draft"):
        loaded.engine.step(Fixed(6))
    loaded.engine.target.experts.store.checkpoint.close()


def test_the_plan_is_known_before_anything_is_read(pair, reads):
    plan = plan_for(settings(pair, pin_layers=1, cache_slots=7))
    assert (plan.pinned, plan.slots) == ((0,), 7)

    def stop(found: MemoryPlan) -> None:
        assert (found.pinned, found.slots) == ((0,), 7)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(settings(pair, pin_layers=1, cache_slots=7), stop)
    assert reads == []


@pytest.mark.parametrize("backend", ["metal", "cuda", "cpu", "reference"])
def test_what_a_gpu_takes_of_the_process_is_planned(backend, pair, monkeypatch):
    held = [1000]
    monkeypatch.setattr(load_module, "choose_backend", lambda *_: Backend(backend, mx.float32, ""))
    monkeypatch.setattr(load_module, "start_gpu", lambda: held.append(500))
    monkeypatch.setattr(load_module, "resident_bytes", lambda: sum(held))
    runtime, second = plan_for(settings(pair)).parts[:2]
    expected = 1500 if backend in ("metal", "cuda") else 1000
    assert (runtime.name, runtime.bytes) == ("runtime", expected)
    compiles = {"cuda": "kernels", "cpu": "kernel compiler"}
    assert second.name == compiles.get(backend, second.name)
    assert (second in KERNEL_PARTS.values()) == (backend in compiles)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_a_gpu_starts_once():
    start_gpu()
    before = resident_bytes()
    start_gpu()
    assert resident_bytes() - before < 64 << 20


def test_what_mlx_keeps_of_freed_buffers_is_what_was_planned(pair):
    before = mx.set_cache_limit(1 << 40)
    try:
        loaded = load(settings(pair))
        assert mx.set_cache_limit(before) == KEPT_BYTES
    finally:
        mx.set_cache_limit(before)
    loaded.engine.target.experts.store.checkpoint.close()


def change_config(folder, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


class Broken:
    """Ways to break a pair: each changes it and gives the settings, the error and its words."""

    @staticmethod
    def no_target(pair):
        return {"model": str(pair.target / "nowhere")}, SpecdecError, "nowhere"

    @staticmethod
    def no_draft(pair):
        return {"draft": str(pair.draft / "nowhere")}, SpecdecError, "nowhere"

    @staticmethod
    def other_family(pair):
        raw = json.loads((pair.target / "config.json").read_text())
        raw["text_config"]["model_type"] = raw["model_type"] = "llama"
        (pair.target / "config.json").write_text(json.dumps(raw))
        return {}, CheckpointError, "unknown model_type 'llama'"

    @staticmethod
    def no_tokenizer(pair):
        (pair.target / "tokenizer.json").unlink()
        return {}, CheckpointError, r"tokenizer\.json: not found"

    @staticmethod
    def broken_tokenizer(pair):
        (pair.target / "tokenizer.json").write_text("{")
        return {}, CheckpointError, r"tokenizer\.json: not a readable tokenizer"

    @staticmethod
    def draft_of_another_vocabulary(pair):
        change_config(pair.draft, vocab_size=400)
        return {}, PairingError, "vocabulary 400, the target has 320"

    @staticmethod
    def draft_of_another_width(pair):
        change_config(pair.draft, hidden_size=128)
        return {}, PairingError, "hidden size 128, the target has 64"

    @staticmethod
    def taps_out_of_range(pair):
        dflash = {"target_layer_ids": [0, 2, 9], "mask_token_id": 319}
        change_config(pair.draft, dflash_config=dflash)
        return {}, PairingError, r"target_layer_ids \[9\] out of range"

    @staticmethod
    def too_many_pins(pair):
        return {"pin_layers": 5}, PlanError, "--pin-layers 5"

    @staticmethod
    def negative_pins(pair):
        return {"pin_layers": -1}, PlanError, "--pin-layers -1"

    @staticmethod
    def no_slots(pair):
        return {"pin_layers": 1, "cache_slots": 0}, PlanError, "--cache-slots 0"

    @staticmethod
    def no_memory(pair):
        return {"memory_gb": 0.001}, PlanError, "the memory plan needs"

    @staticmethod
    def no_experts(pair):
        rewrite(
            pair.target, lambda tensors: {k: v for k, v in tensors.items() if "3.mlp.sw" not in k}
        )
        return {}, CheckpointError, r"layers\.3\.mlp\.switch_mlp.*missing"

    @staticmethod
    def truncated(pair):
        file = pair.target / "model.safetensors"
        os.truncate(file, file.stat().st_size - 10)
        return {}, CheckpointError, r"model\.safetensors"


WAYS = [name for name in vars(Broken) if not name.startswith("_")]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_wrong_is_said_before_a_weight_is_read(way, pair, reads):
    changes, kind, words = getattr(Broken, way)(pair)
    before = open_files()
    with pytest.raises(kind, match=words) as caught:
        load(settings(pair, **changes))
    assert isinstance(caught.value, SpecdecError)
    assert caught.value.exit_code == 2
    assert reads == []
    assert open_files() == before


def test_a_missing_dense_tensor_is_named(pair):
    rewrite(
        pair.target, lambda tensors: {k: v for k, v in tensors.items() if "2.mlp.gate." not in k}
    )
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.gate\.weight is missing"):
        load(settings(pair))


def test_a_draft_of_another_block_of_tensors_is_refused(pair, tmp_path):
    raw = json.loads((pair.target / "config.json").read_text())
    folder = write_draft(tmp_path / "other", raw)
    change_config(folder, intermediate_size=80)
    with pytest.raises(CheckpointError, match="mlp"):
        load(settings(pair, draft=str(folder)))


@pytest.mark.parametrize("name", ["vulkan", "", "CPU", "reference "])
def test_unknown_kernels_are_refused_by_name(name, monkeypatch, pair, reads):
    monkeypatch.setenv("SPECDEC_KERNELS", name)
    with pytest.raises(SpecdecError, match="SPECDEC_KERNELS") as caught:
        load(settings(pair))
    assert repr(name) in str(caught.value)
    assert "reference" in str(caught.value)
    assert reads == []


@pytest.mark.parametrize("name", ["metal", "cuda"])
def test_kernels_of_another_machine_are_refused(name, monkeypatch, pair, reads):
    if getattr(mx, name).is_available():
        pytest.skip("this is that machine")
    monkeypatch.setenv("SPECDEC_KERNELS", name)
    with pytest.raises(SpecdecError, match=f"SPECDEC_KERNELS = '{name}': MLX has no such GPU here"):
        load(settings(pair))
    assert reads == []


def test_a_setting_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("SPECDEC_KERNELS", "cpu")
    chosen = choose_backend(kernels="reference")
    assert (chosen.name, chosen.why) == ("reference", "forced by --kernels")


def test_a_tree_of_more_rows_than_the_gpu_kernels_take_is_refused(monkeypatch, pair, reads):
    backend = Backend("cuda", mx.bfloat16, "a test")
    monkeypatch.setattr("specdec.load.choose_backend", lambda *_: backend)
    with pytest.raises(PlanError, match="--budget 32: the cuda kernels verify 32 rows at a time"):
        load(settings(pair, budget=32))
    assert reads == []


def test_forced_kernels_are_taken(monkeypatch):
    monkeypatch.setenv("SPECDEC_KERNELS", "reference")
    chosen = choose_backend()
    assert chosen.name == "reference"
    assert "SPECDEC_KERNELS" in chosen.why
    if NUMBA:
        monkeypatch.setenv("SPECDEC_KERNELS", "cpu")
        assert choose_backend(mx.bfloat16) == Backend("cpu", mx.float32, chosen.why)


def without_numba(monkeypatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "numba" else real(name, *a)
    )


def test_without_numba_the_reference_runs_and_says_why(monkeypatch):
    monkeypatch.delenv("SPECDEC_KERNELS", raising=False)
    without_numba(monkeypatch)
    chosen = choose_backend()
    assert chosen.name == "reference"
    assert ON_GPU or "numba is not installed" in chosen.why
    monkeypatch.setenv("SPECDEC_KERNELS", "cpu")
    with pytest.raises(SpecdecError, match="needs numba"):
        choose_backend()


@pytest.mark.skipif(ON_GPU or not NUMBA, reason="a machine without a GPU and with numba")
def test_a_machine_without_a_gpu_takes_the_cpu_kernels(monkeypatch):
    monkeypatch.delenv("SPECDEC_KERNELS", raising=False)
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        chosen = choose_backend(dtype)
        assert (chosen.name, chosen.dtype) == ("cpu", mx.float32)


def test_a_gpu_takes_its_kernels_in_bfloat16_or_the_checkpoints_float32(monkeypatch):
    monkeypatch.delenv("SPECDEC_KERNELS", raising=False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    name = "metal" if mx.metal.is_available() else "cuda"
    for dtype, expected in (
        (mx.bfloat16, mx.bfloat16),
        (mx.float16, mx.bfloat16),
        (mx.float32, mx.float32),
    ):
        chosen = choose_backend(dtype)
        assert (chosen.name, chosen.dtype) == (name, expected)
    assert choose_backend().dtype == mx.bfloat16


def test_what_cuda_holds_is_a_copy_of_what_the_host_read(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "target", "qwen3_moe")
    copied = []

    def counted(array):
        copied.append(array)
        return moved(array)

    monkeypatch.setattr(array_module, "moved", counted)
    with checkpoint_module.Checkpoint.open(folder) as checkpoint:
        for name in ("model.embed_tokens.weight", "model.norm.weight"):
            read = checkpoint.load(name)
            found = Backend("cuda", read.dtype, "").load(checkpoint, name)
            assert mx.array_equal(found, read)
            Backend("metal", read.dtype, "").load(checkpoint, name)  # shares memory: no copy
    assert len(copied) == 2


@pytest.mark.parametrize(("wish", "why"), [("1", "with matrix units"), ("0", "without matrix")])
def test_matrix_units_are_chosen_by_the_environment_and_told_of(wish, why, monkeypatch):
    monkeypatch.delenv("SPECDEC_KERNELS", raising=False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(tiles._tiles, "on", None)
    monkeypatch.setenv("SPECDEC_MATRIX_UNITS", wish)
    assert why in choose_backend(mx.bfloat16).why
    assert tiles.tiles_for(mx.bfloat16, 4, 64, 256) is (wish == "1")
    assert "matrix" not in choose_backend(mx.float32).why  # for which there are none


@pytest.mark.parametrize(("capability", "why"), [((8, 0), "with"), ((7, 5), "without")])
def test_nvidia_gpus_have_matrix_units_where_they_take_bfloat16(capability, why, monkeypatch):
    monkeypatch.delenv("SPECDEC_KERNELS", raising=False)
    monkeypatch.delenv("SPECDEC_MATRIX_UNITS", raising=False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    names = "compute_capability_major", "compute_capability_minor"
    monkeypatch.setattr(mx, "device_info", lambda d: dict(zip(names, capability, strict=True)))
    monkeypatch.setattr(tiles._tiles, "on", None)
    assert choose_backend().why.endswith(f", {why} matrix units")
    monkeypatch.setattr(tiles._tiles, "on", None)
    monkeypatch.setenv("SPECDEC_MATRIX_UNITS", "1")
    if capability < (8, 0):
        with pytest.raises(SpecdecError, match=r"7\.5, bfloat16 needs 8\.0"):
            choose_backend()
    else:
        assert choose_backend().why.endswith(", with matrix units")


def test_a_wish_for_matrix_units_that_is_none_is_refused(monkeypatch):
    monkeypatch.delenv("SPECDEC_KERNELS", raising=False)
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(tiles._tiles, "on", None)
    monkeypatch.setenv("SPECDEC_MATRIX_UNITS", "yes")
    with pytest.raises(SpecdecError, match="SPECDEC_MATRIX_UNITS = 'yes', expected 0 or 1"):
        choose_backend()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_floats_are_held_in_the_backends_dtype(dtype, tmp_path):
    folder = write_checkpoint(tmp_path / "target", "qwen3_moe", dtype=dtype)
    pair = write_pair(tmp_path / "other")
    (folder / "tokenizer.json").write_bytes((pair.target / "tokenizer.json").read_bytes())
    loaded = load(Settings(model=str(folder), context=64))
    target = loaded.engine.target
    assert str(target.norm.weight.dtype) in ("float32", str(loaded.backend.dtype))
    output = target.prefill([1, 2, 3])
    assert np.isfinite(np.array(output.logits)).all()
    target.experts.store.checkpoint.close()
