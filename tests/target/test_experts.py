"""Experts from disk: geometry, reads, banks, the LRU cache and its behaviour under faults.

Everything is compared with the same tensors read by MLX itself.
"""

import errno
import os
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specdec import checkpoint as checkpoint_module
from specdec.checkpoint import Checkpoint
from specdec.errors import CheckpointError, ExpertReadError, PlanError
from specdec.target import expert_store as store_module
from specdec.target.config import TargetConfig
from specdec.target.expert_cache import ExpertCache, Wave
from specdec.target.expert_store import ExpertStore
from specdec.target.pins import pinned_layers, share_slots
from tests.checkpoints import write_checkpoint

LAYERS, EXPERTS = 4, 8
SMALL: dict[str, Any] = {"hidden_size": 32, "moe_intermediate_size": 32, "gates": (8, 32)}
MIXED = {"layers.1.mlp.switch_mlp.down_proj": (8, 32), "layers.2.mlp.switch_mlp.up_proj": None}


def bytes_on_disk(store: ExpertStore, layer: int) -> int:
    """What one miss of a layer reads."""
    return sum(tensor.bytes_on_disk for tensor in store.geometry(layer).tensors)


class Opened:
    """A checkpoint with its store, and every expert's bytes as MLX reads them."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint.open(folder)
        self.store = ExpertStore(self.checkpoint, TargetConfig.of(self.checkpoint))
        self.truth: dict[str, mx.array] = {}
        for file in folder.glob("*.safetensors"):
            self.truth |= mx.load(str(file))  # type: ignore[arg-type]

    def check(self, layer: int, wave: Wave, dtype: mx.Dtype) -> None:
        """The slots of a wave hold its experts, float for float and bit for bit."""
        for projection in ("gate", "up", "down"):
            weight = getattr(wave.bank, projection)
            for tensor, array in (
                ("weight", weight.data),
                ("scales", weight.scales),
                ("biases", weight.biases),
            ):
                if array is None:
                    continue
                path = f"model.layers.{layer}.mlp.switch_mlp.{projection}_proj.{tensor}"
                expected = self.truth[path]
                if expected.dtype != mx.uint32:
                    expected = expected.astype(dtype)
                assert array.dtype == expected.dtype
                ids, slots = mx.array(wave.experts), mx.array(wave.table[wave.experts])
                assert mx.array_equal(array[slots], expected[ids]), path


class Reads:
    """Counts, and breaks on demand, what passes through the one function that reads weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real, self.bytes, self.calls = checkpoint_module.read_at, 0, 0
        self.offsets: list[tuple[int, int]] = []
        self.fail_at: int | None = None
        self.limit: int | None = None  # bytes a call returns at most
        monkeypatch.setattr(checkpoint_module, "read_at", self)

    def __call__(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        self.calls += 1
        if self.fail_at is not None and self.calls >= self.fail_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.offsets.append((descriptor, offset))
        count = self.real(descriptor, buffer[: self.limit], offset)
        self.bytes += count
        return count


@pytest.fixture(scope="module")
def uniform(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(write_checkpoint(tmp_path_factory.mktemp("uniform"), "qwen3_moe", **SMALL))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    folder = tmp_path_factory.mktemp("mixed")
    return Opened(write_checkpoint(folder, "qwen3_moe", mixed=MIXED, shards=3, **SMALL))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


class LruModel:
    """What the cache should hold: one ordered dictionary per group of layers."""

    def __init__(self, slots: dict[int, int], group: dict[int, int]) -> None:
        self.slots, self.group = slots, group
        self.held: dict[int, OrderedDict] = {key: OrderedDict() for key in slots}

    def ask(self, layer: int, ids: set[int]) -> tuple[int, int]:
        held, slots = self.held[self.group[layer]], self.slots[self.group[layer]]
        hits = {(layer, i) for i in ids if (layer, i) in held}
        missing = sorted(i for i in ids if (layer, i) not in held)
        live, queue = set(hits), list(missing)
        while queue:
            load, queue = queue[: slots - len(live)], queue[slots - len(live) :]
            for _ in range(len(held) + len(load) - slots):
                del held[next(key for key in held if key not in live)]
            held.update(((layer, i), None) for i in load)
            live = set()
        return len(hits), len(missing)

    def touch(self, layer: int, ids: set[int]) -> None:
        held = self.held[self.group[layer]]
        for i in sorted(ids):
            if (layer, i) in held:
                held.move_to_end((layer, i))

    def resident(self, layer: int) -> list[int]:
        return sorted(i for at, i in self.held[self.group[layer]] if at == layer)


requests = st.lists(
    st.tuples(
        st.integers(0, LAYERS - 1),
        st.sets(st.integers(0, EXPERTS - 1), min_size=1),
        st.sets(st.integers(0, EXPERTS - 1)),
    ),
    max_size=12,
)
per_example = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("kind", ["uniform", "mixed"])
@given(slots=st.integers(1, LAYERS * EXPERTS), requests=requests, pins=st.integers(0, 2))
@per_example
def test_any_requests_give_the_right_bytes_as_an_lru_would(
    request: pytest.FixtureRequest, kind: str, slots: int, requests: list, pins: int
) -> None:
    """Right bytes in every wave, each expert in one wave, residency and counters as modelled."""
    opened: Opened = request.getfixturevalue(kind)
    pinned = pinned_layers(pins, range(LAYERS))
    groups = {layer: 0 for layer in range(LAYERS) if layer not in pinned}
    if kind == "mixed":
        kinds = {1: 1, 2: 2}
        groups = {layer: kinds.get(layer, 0) for layer in groups}
    sizes = [EXPERTS * list(groups.values()).count(g) for g in dict.fromkeys(groups.values())]
    if slots < len(sizes):
        with pytest.raises(PlanError, match=f"--cache-slots {slots}"):
            ExpertCache(opened.store, pinned, slots, mx.float32)
        return
    shares = dict(zip(dict.fromkeys(groups.values()), share_slots(slots, sizes), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        counted = Reads(patch)
        cache = ExpertCache(opened.store, pinned, slots, mx.float32)
        cache.load_pinned()
        model = LruModel(shares, groups)
        hits, misses = dict.fromkeys(range(LAYERS), 0), dict.fromkeys(range(LAYERS), 0)
        for layer, ids, touched in requests:
            seen: list[int] = []
            for wave in cache.waves(layer, np.array([*ids, *ids])):
                opened.check(layer, wave, mx.float32)
                assert np.array_equal(np.flatnonzero(wave.table >= 0), wave.experts)
                seen += wave.experts.tolist()
            assert sorted(seen) == sorted(ids)
            cache.touch(layer, np.array(sorted(touched), np.int32))
            if layer in pinned:
                hits[layer] += len(ids)
                continue
            more = model.ask(layer, ids)
            hits[layer] += more[0]
            misses[layer] += more[1]
            model.touch(layer, touched)
            for each in groups:
                assert cache.resident(each).tolist() == model.resident(each)
        for one in cache.counters():
            assert (one.hits, one.misses) == (hits[one.layer], misses[one.layer])
            assert one.pinned == (one.layer in pinned)
            each = bytes_on_disk(opened.store, one.layer)
            assert one.bytes_read == each * (EXPERTS if one.pinned else one.misses)
        assert sum(one.bytes_read for one in cache.counters()) == counted.bytes


def test_one_wave_when_the_experts_fit_and_hits_come_first(uniform: Opened) -> None:
    cache = ExpertCache(uniform.store, (), 4, mx.float32)
    assert [w.experts.tolist() for w in cache.waves(0, np.array([7, 1]))] == [[1, 7]]
    waves = [w.experts.tolist() for w in cache.waves(0, np.arange(8))]
    assert waves == [[0, 1, 2, 7], [3, 4, 5, 6]]


def test_verify_alone_does_not_refresh_what_was_resident(uniform: Opened) -> None:
    cache = ExpertCache(uniform.store, (), 2, mx.float32)
    for expert in (0, 1, 0):  # the second use of 0 is a hit that was never committed
        list(cache.waves(0, np.array([expert])))
    list(cache.waves(0, np.array([2])))
    assert cache.resident(0).tolist() == [1, 2]
    cache.touch(0, np.array([1]))
    list(cache.waves(0, np.array([3])))
    assert cache.resident(0).tolist() == [1, 3]


def test_the_misses_of_a_wave_are_read_by_ascending_offset(mixed: Opened, reads: Reads) -> None:
    cache = ExpertCache(mixed.store, (), LAYERS * EXPERTS, mx.float32)
    list(cache.waves(0, np.array([6, 2, 5])))
    files = [descriptor for descriptor, _ in reads.offsets]
    assert len(set(files)) == 3
    assert len([1 for a, b in pairwise(files) if a != b]) == 2
    for file in set(files):
        offsets = [offset for descriptor, offset in reads.offsets if descriptor == file]
        assert offsets == sorted(offsets)


@pytest.mark.parametrize("on_disk", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("resident", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("quantize", [(4, 32), None])
def test_floats_are_converted_as_mlx_converts(
    tmp_path: Path, on_disk: str, resident: mx.Dtype, quantize: tuple[int, int] | None
) -> None:
    folder = write_checkpoint(
        tmp_path, "qwen3_next", dtype=on_disk, quantize=quantize, num_hidden_layers=2, **SMALL
    )
    opened = Opened(folder)
    cache = ExpertCache(opened.store, (0,), 3, resident)
    cache.load_pinned()
    for layer in (0, 1):
        for wave in cache.waves(layer, np.arange(EXPERTS)):
            opened.check(layer, wave, resident)
    expected = sum(opened.store.expert_bytes_resident(i, resident) * n for i, n in ((0, 8), (1, 3)))
    assert cache.nbytes == expected


def test_conversions_in_pieces_give_the_same(
    uniform: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = uniform.store.geometry(0).tensors[1].bytes_on_disk  # the scales of one projection
    monkeypatch.setattr(store_module, "STAGING_BYTES", 3 * each)
    cache = ExpertCache(uniform.store, (0,), 1, mx.float32)
    cache.load_pinned()
    uniform.check(0, Wave(cache.bank(0), np.arange(8), np.arange(8)), mx.float32)


def test_pinned_layers_load_whole_with_progress(uniform: Opened, reads: Reads) -> None:
    cache = ExpertCache(uniform.store, (0, 3), 2, mx.bfloat16)
    progress: list[tuple[int, int]] = []
    cache.load_pinned(lambda done, total: progress.append((done, total)))
    total = 2 * EXPERTS * bytes_on_disk(uniform.store, 0)
    assert progress[-1] == (total, total)
    assert reads.bytes == total
    assert reads.calls == 2 * 9  # dtypes agree: one read per stacked tensor
    (wave,) = cache.waves(3, np.array([4, 2]))
    assert wave.table.tolist() == [-1, -1, 2, -1, 4, -1, -1, -1]
    uniform.check(3, Wave(cache.bank(3), np.arange(8), np.arange(8)), mx.bfloat16)
    cache.reset_counters()
    assert all(one.bytes_read == one.hits == 0 for one in cache.counters())


def test_partial_reads_are_continued(uniform: Opened, reads: Reads) -> None:
    reads.limit = 100
    cache = ExpertCache(uniform.store, (0,), 3, mx.float32)
    cache.load_pinned()
    for layer in (0, 1):
        for wave in cache.waves(layer, np.arange(EXPERTS)):
            uniform.check(layer, wave, mx.float32)


@given(fail_at=st.integers(1, 40), slots=st.integers(1, 6), ids=st.sets(st.integers(0, 7)))
@per_example
def test_a_failed_read_leaves_slots_valid_or_empty(
    uniform: Opened, fail_at: int, slots: int, ids: set[int]
) -> None:
    """An I/O error at any read: the error says where, what remains is right, a retry succeeds."""
    with pytest.MonkeyPatch.context() as patch:
        reads = Reads(patch)
        cache = ExpertCache(uniform.store, (), slots, mx.float32)
        list(cache.waves(1, np.array([0, 3])))
        reads.calls, reads.fail_at = 0, fail_at
        error = ""
        try:
            for wave in cache.waves(2, np.array(sorted(ids), np.int32)):
                uniform.check(2, wave, mx.float32)
        except ExpertReadError as raised:
            error = str(raised)
        if reads.calls < fail_at:
            assert error == ""
        else:
            assert "model.safetensors" in error
            assert os.strerror(errno.EIO) in error
        reads.fail_at = None
        before = reads.bytes
        for layer in (1, 2):
            for wave in cache.waves(layer, cache.resident(layer)):
                uniform.check(layer, wave, mx.float32)
        assert reads.bytes == before  # what is called resident needs no read
        for wave in cache.waves(2, np.array(sorted(ids), np.int32)):
            uniform.check(2, wave, mx.float32)
        assert sum(one.bytes_read for one in cache.counters()) <= reads.bytes


def test_slots_emptied_by_a_failed_read_are_the_first_to_be_filled(
    uniform: Opened, reads: Reads
) -> None:
    cache = ExpertCache(uniform.store, (), 4, mx.float32)
    list(cache.waves(0, np.array([0, 1])))
    list(cache.waves(0, np.array([2, 3])))
    reads.fail_at = reads.calls + 1
    with pytest.raises(ExpertReadError):  # 0 and 1 are live, though they are the oldest
        list(cache.waves(0, np.array([0, 1, 5, 6])))
    assert cache.resident(0).tolist() == [0, 1]
    reads.fail_at = None
    list(cache.waves(1, np.array([4, 7])))
    assert (cache.resident(0).tolist(), cache.resident(1).tolist()) == ([0, 1], [4, 7])


def test_a_file_truncated_while_open_is_a_short_read(tmp_path: Path) -> None:
    opened = Opened(write_checkpoint(tmp_path, "qwen3_moe", **SMALL))
    cache = ExpertCache(opened.store, (), 4, mx.float32)
    list(cache.waves(3, np.array([0])))
    info = opened.store.infos(3)[0]
    os.truncate(info.file, info.offset + info.nbytes // EXPERTS * 3 + 1)
    with pytest.raises(ExpertReadError, match=rf"model\.safetensors: short read of .*{info.name}"):
        list(cache.waves(3, np.array([2, 3])))
    assert cache.resident(3).tolist() == [0]


def test_interrupt_in_a_wave_leaves_the_cache_usable(
    uniform: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ExpertCache(uniform.store, (), 2, mx.float32)
    real = checkpoint_module.read_at

    def interrupted(descriptor: int, buffer: memoryview, offset: int) -> int:
        real(descriptor, buffer, offset)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "read_at", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(cache.waves(0, np.array([0, 1])))
    assert cache.resident(0).tolist() == []
    for wave in cache.waves(0, np.array([0, 1])):
        uniform.check(0, wave, mx.float32)


def test_layers_of_another_packing_get_their_own_slots(mixed: Opened) -> None:
    cache = ExpertCache(mixed.store, (), 16, mx.float32)
    held = {}
    for layer in range(LAYERS):
        list(cache.waves(layer, np.arange(EXPERTS)))
    for layer in range(LAYERS):
        held[layer] = len(cache.resident(layer))
    assert held == {0: 0, 1: 4, 2: 4, 3: 8}  # 0 and 3 share eight slots


def test_geometry_follows_the_headers(mixed: Opened) -> None:
    store = mixed.store
    packed = 32 * 32 // 2  # one 4-bit projection of 32 x 32
    scales = 2 * 32 * 2  # and its scales and biases in bfloat16
    assert bytes_on_disk(store, 0) == 3 * (packed + scales)
    assert store.expert_bytes_resident(0, mx.float32) == 3 * (packed + 2 * scales)
    assert bytes_on_disk(store, 1) == 2 * packed + 2 * packed + 3 * scales
    assert bytes_on_disk(store, 2) == 2 * (packed + scales) + 32 * 32 * 2
    assert store.expert_bytes_resident(2, mx.float32) == 2 * (packed + 2 * scales) + 32 * 32 * 4
    assert store.geometry(0) == store.geometry(3) != store.geometry(1)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"num_experts": 16}, r"gate_proj\.weight has shape \[8, 32, 4\], expected \[16, 32, 4\]"),
        ({"moe_intermediate_size": 64}, r"expected \[8, 64, 4\]"),
        ({"hidden_size": 64}, r"gate_proj.* 2 bits"),
        ({"num_hidden_layers": 5}, r"layers\.4\.mlp\.switch_mlp\.gate_proj\.weight is missing"),
    ],
)
def test_experts_that_contradict_the_config_are_refused(
    uniform: Opened, config: dict, text: str
) -> None:
    raw = {**uniform.checkpoint.config, **config}
    with pytest.raises(CheckpointError, match=text):
        ExpertStore(uniform.checkpoint, TargetConfig.from_dict(raw, "config.json"))


def test_dense_layers_have_no_experts(tmp_path: Path) -> None:
    opened = Opened(write_checkpoint(tmp_path, "qwen3_moe", mlp_only_layers=[1], **SMALL))
    assert opened.store.layers == (0, 2, 3)


def test_pins_are_first_and_last_then_from_the_top() -> None:
    assert pinned_layers(20, range(24)) == (*range(19), 23)
    assert pinned_layers(16, range(40)) == (*range(15), 39)
    assert pinned_layers(0, range(4)) == ()
    assert pinned_layers(1, range(4)) == (0,)
    assert pinned_layers(2, (1, 3, 5)) == (1, 5)
    assert pinned_layers(1, (2,)) == (2,)
    for count in (-1, 5):
        with pytest.raises(PlanError, match=rf"--pin-layers {count} .* 4 layers"):
            pinned_layers(count, range(4))


@given(layers=st.integers(0, 50))
def test_more_pins_never_unpin(layers: int) -> None:
    chains = [pinned_layers(count, range(layers)) for count in range(layers + 1)]
    assert [len(chain) for chain in chains] == list(range(layers + 1))
    assert all(set(a) < set(b) for a, b in pairwise(chains))


@given(experts=st.lists(st.integers(1, 64), min_size=1, max_size=5), slots=st.integers(1, 400))
def test_groups_share_all_slots_within_their_bounds(experts: list[int], slots: int) -> None:
    if slots < len(experts):
        with pytest.raises(PlanError):
            share_slots(slots, experts)
        return
    shares = share_slots(slots, experts)
    assert sum(shares) == min(slots, sum(experts))
    assert all(1 <= share <= bound for share, bound in zip(shares, experts, strict=True))
    # In proportion: no share is a whole slot off, unless the minimum of one slot forces it.
    ideal = [min(slots, sum(experts)) * count / sum(experts) for count in experts]
    if min(ideal) >= 1:
        assert all(abs(share - quota) < 1 for share, quota in zip(shares, ideal, strict=True))
