"""Experts from disk: geometry, reads, banks, the LRU cache and its behaviour under faults.

Everything is compared with the same tensors read by MLX itself.
"""

import errno
import os
import threading
import time
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
from specdec.target.config import TargetConfig
from specdec.target.expert_cache import ExpertCache, Wave
from specdec.target.expert_store import ExpertStore
from specdec.target.pins import pinned_layers, share_slots
from specdec.target.policy import POLICIES
from specdec.target.streaming import Streaming
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
        self.lock = threading.Lock()
        monkeypatch.setattr(checkpoint_module, "read_at", self)

    def __call__(self, descriptor: int, buffers: Any, offset: int) -> int:
        with self.lock:
            self.calls += 1
            if self.fail_at is not None and self.calls >= self.fail_at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self.offsets.append((descriptor, offset))
        if self.limit is not None:
            buffers = buffers[0][: self.limit]
        count = self.real(descriptor, buffers, offset)
        with self.lock:
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
@pytest.mark.parametrize("policy", POLICIES)
@given(
    slots=st.integers(1, LAYERS * EXPERTS),
    requests=requests,
    pins=st.integers(0, 2),
    protect=st.sampled_from([(0, 0), (1, 1), (6, 3)]),
    depth=st.integers(1, 4),
)
@per_example
def test_any_requests_give_the_right_bytes(
    request: pytest.FixtureRequest,
    kind: str,
    policy: str,
    slots: int,
    requests: list,
    pins: int,
    protect: tuple[int, int],
    depth: int,
) -> None:
    """Right bytes in every wave, each expert in one wave, what was there counts as a hit, and what
    is read is counted."""
    opened: Opened = request.getfixturevalue(kind)
    pinned = pinned_layers(pins, range(LAYERS))
    unpinned = [layer for layer in range(LAYERS) if layer not in pinned]
    kinds = len({opened.store.geometry(layer) for layer in unpinned})
    streaming = Streaming(policy=policy, protect=protect, queue_depth=depth, rows=2)
    if slots < kinds:
        with pytest.raises(PlanError, match=f"--cache-slots {slots}"):
            ExpertCache(opened.store, pinned, slots, mx.float32, streaming)
        return
    with pytest.MonkeyPatch.context() as patch:
        counted = Reads(patch)
        cache = ExpertCache(opened.store, pinned, slots, mx.float32, streaming)
        cache.load_pinned()
        hits, misses = dict.fromkeys(range(LAYERS), 0), dict.fromkeys(range(LAYERS), 0)
        for layer, ids, touched in requests:
            there = set(cache.resident(layer).tolist()) & ids
            hits[layer] += len(there)
            misses[layer] += len(ids - there)
            seen: list[int] = []
            for wave in cache.waves(layer, np.array([*ids, *ids])):
                opened.check(layer, wave, mx.float32)
                assert np.array_equal(np.flatnonzero(wave.table >= 0), wave.experts)
                seen += wave.experts.tolist()
            assert sorted(seen) == sorted(ids)
            assert not wave.fleeting
            assert set(wave.experts.tolist()) <= set(cache.resident(layer).tolist())
            cache.touch(layer, np.array(sorted(touched), np.int32))
            assert sum(len(cache.resident(each)) for each in unpinned) <= cache.slots
        for one in cache.counters():
            assert (one.hits, one.misses) == (hits[one.layer], misses[one.layer])
            assert one.pinned == (one.layer in pinned)
            each = bytes_on_disk(opened.store, one.layer)
            assert one.bytes_read == each * (EXPERTS if one.pinned else one.misses)
            held = 0 if one.pinned else len(cache.resident(one.layer))
            assert one.evictions == (0 if one.pinned else one.misses - held)
        assert sum(one.bytes_read for one in cache.counters()) == counted.bytes
        assert cache.reads().bytes == counted.bytes


def test_what_is_there_comes_first_and_the_rest_in_one_wave(uniform: Opened) -> None:
    cache = ExpertCache(uniform.store, (), 8, mx.float32)
    assert [w.experts.tolist() for w in cache.waves(0, np.array([7, 1]))] == [[], [1, 7]]
    waves = list(cache.waves(0, np.array([1, 7, 2, 3])))
    assert [(w.experts.tolist(), w.fleeting) for w in waves] == [([1, 7], False), ([2, 3], False)]
    assert [w.experts.tolist() for w in cache.waves(0, np.array([3, 1]))] == [[1, 3]]


def test_more_than_the_slots_hold_comes_in_fleeting_waves(uniform: Opened) -> None:
    """Each is read while the one before it is used: half of the slots at a time."""
    cache = ExpertCache(uniform.store, (), 4, mx.float32)
    waves = [(w.experts.tolist(), w.fleeting) for w in cache.waves(0, np.arange(8))]
    assert waves[0] == ([], False)  # time to compute what needs none of them
    assert waves[1:] == [([0, 1], True), ([2, 3], True), ([4, 5], True), ([6, 7], False)]


def test_missing_experts_are_asked_for_before_the_first_wave(
    uniform: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one request, and they arrive while the first wave is computed with."""
    cache = ExpertCache(uniform.store, (), 8, mx.float32)
    list(cache.waves(0, np.array([0])))
    real, begun = checkpoint_module.read_at, threading.Event()

    def slow(*arguments: Any) -> int:
        begun.set()
        return real(*arguments)

    monkeypatch.setattr(checkpoint_module, "read_at", slow)
    waves = cache.waves(0, np.array([0, 1, 2, 3]))
    assert next(waves).experts.tolist() == [0]
    assert begun.wait(10)
    time.sleep(0.05)
    before = cache.counters()[0].stall_seconds
    assert next(waves).experts.tolist() == [1, 2, 3]
    assert list(waves) == []
    assert cache.counters()[0].stall_seconds - before < 0.02  # they had come meanwhile


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
    one_by_one = Streaming(queue_depth=1)
    cache = ExpertCache(mixed.store, (), LAYERS * EXPERTS, mx.float32, one_by_one)
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
    sizes = [opened.store.geometry(layer).bytes_resident(resident) for layer in (0, 1)]
    assert cache.nbytes == 8 * sizes[0] + 3 * sizes[1]


def test_pinned_layers_load_whole_with_progress(uniform: Opened, reads: Reads) -> None:
    cache = ExpertCache(uniform.store, (0, 3), 2, mx.bfloat16)
    progress: list[tuple[int, int]] = []
    cache.load_pinned(lambda done, total: progress.append((done, total)))
    total = 2 * EXPERTS * bytes_on_disk(uniform.store, 0)
    assert progress[-1] == (total, total)
    assert reads.bytes == total
    assert reads.calls <= 2 * 9  # what touches is read together
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
    with pytest.raises(
        ExpertReadError, match=r"model\.safetensors: short read at byte \d+: wanted"
    ):
        list(cache.waves(3, np.array([2, 3])))
    assert cache.resident(3).tolist() == [0]


def test_interrupt_in_a_wave_leaves_the_cache_usable(
    uniform: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ExpertCache(uniform.store, (), 2, mx.float32)
    real = checkpoint_module.read_at

    def interrupted(*arguments: Any) -> int:
        real(*arguments)
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
    for layer in range(LAYERS):
        list(cache.waves(layer, np.arange(EXPERTS)))
    held = {layer: len(cache.resident(layer)) for layer in range(LAYERS)}
    assert held == {0: 4, 1: 4, 2: 4, 3: 4}  # 0 and 3 share eight slots


def test_geometry_follows_the_headers(mixed: Opened) -> None:
    store = mixed.store
    packed = 32 * 32 // 2  # one 4-bit projection of 32 x 32
    scales = 2 * 32 * 2  # and its scales and biases in bfloat16
    assert bytes_on_disk(store, 0) == 3 * (packed + scales)
    assert store.geometry(0).bytes_resident(mx.float32) == 3 * (packed + 2 * scales)
    assert bytes_on_disk(store, 1) == 2 * packed + 2 * packed + 3 * scales
    assert bytes_on_disk(store, 2) == 2 * (packed + scales) + 32 * 32 * 2
    assert store.geometry(2).bytes_resident(mx.float32) == 2 * (packed + 2 * scales) + 32 * 32 * 4
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
