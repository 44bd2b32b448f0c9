"""The repacked store gives what the checkpoint gives, bit for bit, and refuses what contradicts."""

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from specdec import checkpoint as checkpoint_module
from specdec.checkpoint import Checkpoint
from specdec.errors import CheckpointError, ExpertReadError
from specdec.generation import Request, generate
from specdec.load import Settings, load
from specdec.repack import repack
from specdec.target.config import TargetConfig
from specdec.target.expert_cache import ExpertCache
from specdec.target.expert_store import ExpertStore
from specdec.target.repacked_index import INDEX
from specdec.target.repacked_store import RepackedStore, open_store
from tests.checkpoints import FAMILIES, write_checkpoint
from tests.commands import PROMPT, recorded
from tests.pairs import write_pair

MIXED = {"layers.1.mlp.switch_mlp.down_proj": (8, 32), "layers.2.mlp.switch_mlp.up_proj": None}


def repacked(folder: Path, out: Path, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    with Checkpoint.open(folder) as checkpoint:
        store = ExpertStore(checkpoint, TargetConfig.of(checkpoint))
        order = {n: random.permutation(store.num_experts).tolist() for n in store.layers}
        repack(checkpoint, store, out, order, "by hand")
    return out


def stores(folder: Path, out: Path) -> tuple[ExpertStore, RepackedStore]:
    plain, other = Checkpoint.open(folder), Checkpoint.open(out)
    one = open_store(plain, TargetConfig.of(plain))
    two = open_store(other, TargetConfig.of(other))
    assert type(one) is ExpertStore
    assert isinstance(two, RepackedStore)
    return one, two


def banks(store: ExpertStore, dtype: mx.Dtype) -> list[bytes]:
    """Every expert of every layer, through slots and pinned, as the banks hold it."""
    cache = ExpertCache(store, store.layers[:1], 9, dtype)
    cache.load_pinned()
    found = []
    for layer in store.layers:
        for wave in cache.waves(layer, np.arange(store.num_experts)):
            slots = mx.array(wave.table[wave.experts])
            for weight in (wave.bank.gate, wave.bank.up, wave.bank.down):
                for array in (weight.data, weight.scales, weight.biases):
                    if array is not None:
                        found.append(np.array(array.view(mx.uint8)[slots]).tobytes())
    read = sum(one.bytes_read for one in cache.counters())
    assert read == sum(
        store.num_experts * sum(t.bytes_on_disk for t in store.geometry(n).tensors)
        for n in store.layers
    )
    return found


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_banks_hold_the_same_bits(tmp_path: Path, family: str, dtype: mx.Dtype) -> None:
    folder = write_checkpoint(tmp_path / "model", family, mixed=MIXED, shards=2)
    one, two = stores(folder, repacked(folder, tmp_path / "out"))
    assert all(one.geometry(layer) == two.geometry(layer) for layer in one.layers)
    assert banks(one, dtype) == banks(two, dtype)


def test_spans_lead_to_the_same_bytes_and_lie_in_one_record(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "qwen3_moe", mixed=MIXED, shards=2)
    one, two = stores(folder, repacked(folder, tmp_path / "out"))
    for layer in one.layers:
        for expert in range(one.num_experts):
            spans = two.spans(layer, expert)
            for left, right in zip(one.spans(layer, expert), spans, strict=True):
                assert left.nbytes == right.nbytes
                assert os.pread(
                    one.files[left.file].descriptor, left.nbytes, left.offset
                ) == os.pread(two.files[right.file].descriptor, right.nbytes, right.offset)
            start = min(span.offset for span in spans)
            assert start % 16384 == 0
            end = max(span.offset + span.nbytes for span in spans)
            assert end - start == two.geometry(layer).bytes_on_disk
            assert len({span.file for span in spans}) == 1


@pytest.mark.parametrize("quantize", [(4, 32), (3, 64), None])
@pytest.mark.parametrize("budget", [1, 5])
def test_the_same_tokens_from_either_store(
    tmp_path: Path, quantize: tuple[int, int] | None, budget: int
) -> None:
    pair = write_pair(tmp_path, quantize=quantize)
    out = repacked(pair.target, tmp_path / "out")
    tokens = []
    for model, slots, pins in ((pair.target, 7, 1), (out, 7, 1), (out, 3, 0), (out, None, 4)):
        settings = Settings(
            str(model), str(pair.draft), context=64, cache_slots=slots, pin_layers=pins
        )
        loaded = load(settings)
        request = Request((5, 6, 7, 8), budget, max_tokens=24)
        tokens.append(generate(loaded.engine, loaded.tokenizer, request).tokens)
    assert len(set(tokens)) == 1


def test_the_command_line_takes_a_repacked_folder(tmp_path: Path) -> None:
    pair = write_pair(tmp_path)
    out = repacked(pair.target, tmp_path / "out")
    runs = [
        recorded(tmp_path, "generate", "-m", m, "--draft", pair.draft, *PROMPT, *few)[1]["runs"]
        for m in (pair.target, out)
        for few in [("--cache-slots", "5", "--max-tokens", "9")]
    ]
    first, second = (one["speculative"] for one in runs)
    assert first["tokens"] == second["tokens"]
    figures = ("hits", "misses", "bytes_read", "evictions")
    for name in figures:
        assert first["metrics"]["experts"][name] == second["metrics"]["experts"][name]


def test_a_layer_file_truncated_while_open_is_a_short_read(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", "qwen3_moe")
    _, store = stores(folder, repacked(folder, tmp_path / "out"))
    cache = ExpertCache(store, (), 4, mx.float32)
    list(cache.waves(3, np.array([0])))
    os.truncate(tmp_path / "out" / "experts-00003.bin", 100)
    with pytest.raises(ExpertReadError, match=r"experts-00003\.bin: short read at byte"):
        list(cache.waves(3, np.array([2, 3])))
    assert cache.resident(3).tolist() == [0]


def test_an_error_of_the_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "model", "qwen3_moe")
    _, store = stores(folder, repacked(folder, tmp_path / "out"))
    cache = ExpertCache(store, (), 4, mx.float32)

    def broken(*arguments: Any) -> int:
        raise OSError(5, "Input/output error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_module, "read_at", broken)
        with pytest.raises(ExpertReadError, match=r"experts-00002\.bin.*Input/output error"):
            list(cache.waves(2, np.array([1])))
    list(cache.waves(2, np.array([1])))


CHANGES = {
    "layer 2 is missing": lambda d: d["layers"].pop(2),
    "has 4 experts, config": lambda d: [
        one.update(places=[0, 1, 2, 3], stride=2 * one["stride"]) for one in d["layers"]
    ],
    "config.json and its packing make it": lambda d: d["layers"][1]["quantization"].__setitem__(
        0, {"bits": 8, "group_size": 32}
    ),
    "but config.json has experts in": lambda d: d["layers"].append({**d["layers"][0], "layer": 9}),
}


@pytest.mark.parametrize("words", CHANGES)
def test_an_index_that_contradicts_the_config_is_refused(tmp_path: Path, words: str) -> None:
    out = repacked(write_checkpoint(tmp_path / "model", "qwen3_moe"), tmp_path / "out")
    document = json.loads((out / INDEX).read_text())
    CHANGES[words](document)
    (out / INDEX).write_text(json.dumps(document))
    with Checkpoint.open(out) as checkpoint, pytest.raises(CheckpointError, match=words):
        open_store(checkpoint, TargetConfig.of(checkpoint))
