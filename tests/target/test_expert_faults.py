"""Experts under faults: slow disks, interrupts at any line, errors amid prefetch, two processes.

Whatever happens, what the cache calls resident holds the right bytes, and the next request works.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from specdec import checkpoint as checkpoint_module
from specdec.errors import ExpertReadError
from specdec.target import expert_loads, read_queue
from specdec.target.expert_cache import ExpertCache
from specdec.target.read_queue import Request
from specdec.target.streaming import Streaming
from tests.checkpoints import write_checkpoint
from tests.pairs import write_pair
from tests.target.test_experts import EXPERTS, LAYERS, SMALL, Opened

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(write_checkpoint(tmp_path_factory.mktemp("faults"), "qwen3_moe", **SMALL))


def check_all(opened: Opened, cache: ExpertCache) -> None:
    """What is called resident is right, and everything can be asked for."""
    for layer in range(LAYERS):
        for wave in cache.waves(layer, cache.resident(layer)):
            opened.check(layer, wave, mx.float32)
    for layer in range(LAYERS):
        for wave in cache.waves(layer, np.arange(EXPERTS)):
            opened.check(layer, wave, mx.float32)


class SlowDisk:
    """Reads that take a while, and fail on demand."""

    def __init__(self, patch: pytest.MonkeyPatch, seconds: float) -> None:
        self.real, self.seconds, self.broken = checkpoint_module.read_at, seconds, False
        patch.setattr(checkpoint_module, "read_at", self)

    def __call__(self, *arguments: Any) -> int:
        time.sleep(self.seconds)
        if self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self.real(*arguments)


class Gate:
    """Reads that wait until their expert is let through.

    A read is of the (layer, expert) whose bytes it begins with.
    """

    def __init__(self, patch: pytest.MonkeyPatch, opened: Opened) -> None:
        self.real, store = checkpoint_module.read_at, opened.store
        names = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
        self.names = {span.offset: name for name in names for span in store.spans(*name)}
        self.opened = {name: threading.Event() for name in names}
        self.offsets: list[int] = []  # of all reads, as they begin
        self.order: list[tuple[int, int]] = []  # of the experts' first reads
        self.begun = threading.Semaphore(0)  # up by one at each of these
        self.errors: Iterator[OSError] = iter(())  # of the next reads that are let through
        self.lock = threading.Lock()
        patch.setattr(checkpoint_module, "read_at", self)

    def __call__(self, descriptor: int, buffers: Any, offset: int) -> int:
        name = self.names[offset]
        with self.lock:
            self.offsets.append(offset)
            if name not in self.order:
                self.order.append(name)
                self.begun.release()
        assert self.opened[name].wait(20)
        for error in self.errors:
            raise error
        return self.real(descriptor, buffers, offset)

    def next(self) -> tuple[int, int]:
        """Wait until one more expert's reads begin: whose."""
        assert self.begun.acquire(timeout=20)
        return self.order[-1]

    def open(self, *names: tuple[int, int]) -> None:
        """Let these experts' reads through, or all."""
        for name in names or self.opened:
            self.opened[name].set()


class Clock:
    """Of a disk whose every read takes one second, beginning only when somebody waits for it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.real, self.seconds = checkpoint_module.read_at, 0.0
        self.lock, self.waits = threading.Lock(), threading.Event()
        patch.setattr(checkpoint_module, "read_at", self.read)
        patch.setattr(expert_loads, "perf_counter", self.wait)
        patch.setattr(read_queue, "perf_counter", lambda: self.seconds)

    def wait(self) -> float:
        """The time, for whoever begins to wait."""
        now = self.seconds
        self.waits.set()
        return now

    def read(self, *arguments: Any) -> int:
        assert self.waits.wait(20)
        with self.lock:
            self.seconds += 1
        return self.real(*arguments)


@pytest.mark.parametrize("direct", [False, True])
def test_a_slow_disk_is_waited_for_and_the_wait_is_told(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    clock = Clock(monkeypatch)
    cache = ExpertCache(opened.store, (), 12, mx.float32, Streaming(direct=direct, queue_depth=2))
    for layer in range(LAYERS):
        before = clock.seconds
        clock.waits.clear()
        _, wave = cache.waves(layer, np.array([1, 4, 6]))  # one load: there is room
        opened.check(layer, wave, mx.float32)
        assert cache.counters()[layer].stall_seconds == clock.seconds - before > 0
    assert cache.reads().seconds == cache.reads().reads == clock.seconds


def interrupt_the_wait(patch: pytest.MonkeyPatch, gate: Gate) -> None:
    """Ctrl-C comes when a load is waited for. What is being read then ends when it is cancelled."""
    real = Request.cancel

    def interrupted(request: Request, seconds: float | None = None) -> bool:
        assert not request.done
        signal.raise_signal(signal.SIGINT)
        return True

    def cancel(request: Request) -> None:
        gate.open()
        real(request)

    patch.setattr(Request, "wait", interrupted)
    patch.setattr(Request, "cancel", cancel)


def test_ctrl_c_while_a_load_is_waited_for(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ExpertCache(opened.store, (), 8, mx.float32)
    list(cache.waves(0, np.array([0, 1])))
    with monkeypatch.context() as patch:
        interrupt_the_wait(patch, Gate(patch, opened))
        with pytest.raises(KeyboardInterrupt):
            list(cache.waves(1, np.arange(EXPERTS)))
    assert cache.resident(1).tolist() == []
    check_all(opened, cache)


def test_an_error_while_the_rest_is_still_being_read(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody takes the second wave: nothing writes to slots of others later."""
    cache = ExpertCache(opened.store, (), 8, mx.float32)
    list(cache.waves(0, np.array([0, 1])))
    with monkeypatch.context() as patch:
        SlowDisk(patch, 0.05)
        assert next(cache.waves(0, np.array([0, 1, 2, 3, 4]))).experts.tolist() == [0, 1]
        waves = cache.waves(1, np.arange(EXPERTS))  # at once, and half of it
        for _ in range(2):
            opened.check(1, next(waves), mx.float32)
        check_all(opened, cache)
    check_all(opened, cache)


class Interrupter:
    """Raises KeyboardInterrupt at the nth line that is run in the modules of the cache.

    Not in the reader's: an interrupt between taking a lock and knowing of it cannot be undone.
    """

    FILES = (
        "target/admission.py",
        "target/expert_cache.py",
        "target/expert_loads.py",
        "target/slots.py",
        "target/policy.py",
    )

    def __init__(self, at: int) -> None:
        self.left = at

    def __enter__(self) -> "Interrupter":
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self.before)

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.endswith(self.FILES):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("policy", ["lru", "s3-fifo"])
def test_an_interrupt_at_any_line_leaves_the_cache_right(opened: Opened, policy: str) -> None:
    def use(cache: ExpertCache) -> None:
        for layer, ids in ((0, [0, 1]), (1, [2, 5, 6, 7]), (0, [1, 3, 4]), (2, range(EXPERTS))):
            for _ in cache.waves(layer, np.array(ids)):
                pass
            cache.touch(layer, np.array(ids))
            cache.prefetch((layer + 1) % LAYERS, np.array([3, 6]))

    at, ended = 1, False
    while not ended:
        cache = ExpertCache(opened.store, (), 9, mx.float32, Streaming(policy=policy))
        try:
            with Interrupter(at):
                use(cache)
                ended = True
        except KeyboardInterrupt:
            pass
        use(cache)
        check_all(opened, cache)
        at += 23
    assert at > 500


# --- prefetch


def settle(cache: ExpertCache) -> None:
    """Wait until nothing is being read any more."""
    for load in cache._loads._running:
        assert load.request._over.wait(20)


def test_what_was_prefetched_is_a_hit(opened: Opened) -> None:
    cache = ExpertCache(opened.store, (), 12, mx.float32)
    each = opened.store.geometry(0).bytes_on_disk
    list(cache.waves(0, np.array([0, 1])))
    assert cache.prefetch(1, np.array([6, 2, 6, 4]), most=2).tolist() == [6, 2]
    assert cache.prefetch(1, np.array([2])).tolist() == []  # on its way already
    settle(cache)
    for wave in cache.waves(1, np.array([2, 3])):
        opened.check(1, wave, mx.float32)
    one = cache.counters()[1]
    assert (one.hits, one.misses, one.early, one.early_hits) == (1, 1, 2, 1)
    assert (one.late, one.failed, one.wasted_bytes) == (0, 0, 0)
    assert (one.bytes_read, one.early_bytes) == (3 * each, 2 * each)


def test_what_is_still_being_prefetched_is_waited_for(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ExpertCache(opened.store, (), 12, mx.float32)
    gate = Gate(monkeypatch, opened)
    cache.prefetch(1, np.array([2]))
    waves = cache.waves(1, np.array([2, 3]))
    assert next(waves).experts.tolist() == []
    gate.open()
    (wave,) = waves
    opened.check(1, wave, mx.float32)
    assert wave.experts.tolist() == [2, 3]
    one = cache.counters()[1]
    assert (one.hits, one.misses, one.early_hits, one.late) == (0, 2, 0, 1)
    assert one.bytes_read == 2 * opened.store.geometry(1).bytes_on_disk


def ask_amid_guesses(opened: Opened, cache: ExpertCache, gate: Gate, asked: list[int]) -> list[int]:
    """Layer 1 asks while a read is held, and gets its experts once it is not: what it has then.

    Nothing is read twice.
    """
    waves = cache.waves(1, np.array(asked))
    assert next(waves).experts.tolist() == []  # without waiting for what is under way
    gate.open()
    (wave,) = waves
    opened.check(1, wave, mx.float32)
    assert wave.experts.tolist() == asked
    settle(cache)
    assert len(set(gate.offsets)) == len(gate.offsets)
    list(cache.waves(0, np.array([], np.int32)))
    return cache.resident(1).tolist()


@pytest.mark.parametrize("under_way", [(1, 6), (0, 7)], ids=["one of them begun", "none begun"])
def test_wrong_guesses_not_begun_are_given_up_when_their_layer_asks(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, under_way: tuple[int, int]
) -> None:
    cache = ExpertCache(opened.store, (), 12, mx.float32, Streaming(queue_depth=1))
    with monkeypatch.context() as patch:
        gate = Gate(patch, opened)
        cache.prefetch(under_way[0], np.array([under_way[1]]))
        assert gate.next() == under_way
        cache.prefetch(1, np.array([6, 5, 4, 2]))
        found = ask_amid_guesses(opened, cache, gate, [2, 3])
    assert found == ([2, 3, 6] if under_way[0] == 1 else [2, 3])
    assert gate.order == [under_way, (1, 2), (1, 3)]
    one, each = cache.counters()[1], opened.store.geometry(1).bytes_on_disk
    assert (one.late, one.failed, one.wasted_bytes) == (1, 0, 0)
    assert one.bytes_read == len(found) * each
    assert cache.resident(0).tolist() == ([7] if under_way[0] == 0 else [])
    check_all(opened, cache)


class Overtaken(threading.Condition):
    """A lock that the main thread takes only after another thread has come so far."""

    def __init__(self) -> None:
        super().__init__(threading.Lock())
        self.before: Iterator[Callable[[], object]] = iter(())  # each time: what it waits for

    def __enter__(self) -> bool:
        if threading.current_thread() is threading.main_thread():
            for wait in self.before:
                wait()
                break
        return super().__enter__()


@pytest.mark.parametrize("nth", [0, 1])
def test_a_guess_that_begins_as_its_layer_asks_is_finished_and_the_others_are_given_up(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """The thread goes on when the pass comes to the queue for the nth time: first to give up all
    wrong guesses, then for what it asks for."""
    cache = ExpertCache(opened.store, (), 12, mx.float32, Streaming(queue_depth=1))
    overtaken = Overtaken()
    monkeypatch.setattr(cache._reader._queue, "_waiting", overtaken)
    with monkeypatch.context() as patch:
        gate = Gate(patch, opened)
        cache.prefetch(0, np.array([7]))
        assert gate.next() == (0, 7)
        cache.prefetch(1, np.array([6, 5, 4, 2]))

        def go_on() -> None:
            gate.open((0, 7))
            gate.next()

        overtaken.before = iter([lambda: None] * nth + [go_on])
        found = ask_amid_guesses(opened, cache, gate, [2, 3])
    assert found == ([2, 3, 6] if nth == 0 else [2, 3])
    begun = [(1, 6)] if nth == 0 else []
    assert gate.order == [(0, 7), *begun, (1, 2), (1, 3)]
    check_all(opened, cache)


def test_what_was_prefetched_and_left_unasked_is_waste(opened: Opened) -> None:
    cache = ExpertCache(opened.store, (), 4, mx.float32, Streaming(protect=(0, 0)))
    each = opened.store.geometry(1).bytes_on_disk
    cache.prefetch(1, np.array([2, 6]))
    settle(cache)
    list(cache.waves(1, np.array([2])))
    for layer in (0, 2):  # both must go for these
        list(cache.waves(layer, np.arange(4)))
    one = cache.counters()[1]
    assert (one.early, one.early_hits, one.wasted_bytes, one.early_bytes) == (2, 1, each, 2 * each)
    cache.reset_counters()
    one = cache.counters()[1]
    assert (one.early, one.early_hits, one.wasted_bytes, one.early_bytes) == (0, 0, 0, 0)


def test_a_guess_evicts_nothing_that_is_as_likely_to_be_asked_for(opened: Opened) -> None:
    cache = ExpertCache(opened.store, (), 6, mx.float32, Streaming(protect=(0, 0)))
    for ids in ([0, 1], [2, 3], [4, 5]):  # asked for 2, 1 and 0 requests of the layer ago
        list(cache.waves(0, np.array(ids)))
    list(cache.waves(1, np.array([], np.int32)))
    assert cache.prefetch(1, np.arange(6), chance=1 / 4).tolist() == []
    assert cache.prefetch(1, np.arange(6), chance=1 / 3).tolist() == [0, 1]
    assert cache.prefetch(1, np.arange(6), chance=1 / 3).tolist() == []  # nor another guess
    assert cache.prefetch(2, np.arange(6), chance=1.0).tolist() == [0, 1, 2, 3]


def test_prefetch_takes_the_slots_of_what_was_used_longest_ago(opened: Opened) -> None:
    cache = ExpertCache(opened.store, (), 6, mx.float32, Streaming(protect=(0, 0)))
    for layer in (0, 1, 2):
        list(cache.waves(layer, np.array([0, 1])))
        cache.touch(layer, np.array([0, 1]))
    cache.touch(0, np.array([0]))
    cache.prefetch(2, np.arange(2, EXPERTS), chance=1.0)  # never those of the request before
    settle(cache)
    list(cache.waves(3, np.array([], np.int32)))
    held = [cache.resident(layer).tolist() for layer in range(3)]
    assert held[2][:2] == [0, 1]
    assert len(held[2]) == 6


@pytest.mark.parametrize("asked", [False, True], ids=["unnoticed", "while it is waited for"])
def test_a_failed_prefetch_ends_nothing(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    """No slot is believed full, the failure is counted, and whoever asks has it read again."""
    cache = ExpertCache(opened.store, (), 12, mx.float32)
    with monkeypatch.context() as patch:
        gate = Gate(patch, opened)
        gate.errors = iter([OSError(errno.EIO, os.strerror(errno.EIO))])
        cache.prefetch(1, np.array([2]))
        if not asked:
            gate.open()
            settle(cache)
            list(cache.waves(0, np.array([], np.int32)))
            assert cache.resident(1).tolist() == []
        waves = cache.waves(1, np.array([2]))
        assert next(waves).experts.tolist() == []
        gate.open()
        (wave,) = waves
        opened.check(1, wave, mx.float32)
    one = cache.counters()[1]
    assert (one.early, one.early_hits, one.failed, one.late) == (1, 0, 1, int(asked))
    assert (one.hits, one.misses) == (0, 1)
    check_all(opened, cache)


def test_a_disk_that_stays_broken_is_met_by_whoever_asks(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ExpertCache(opened.store, (), 12, mx.float32)
    with monkeypatch.context() as patch:
        SlowDisk(patch, 0.02).broken = True
        cache.prefetch(1, np.array([2, 6]))
        with pytest.raises(ExpertReadError, match="Input/output error"):
            list(cache.waves(1, np.array([2])))
    assert cache.resident(1).tolist() == []
    check_all(opened, cache)


def test_prefetch_after_a_pass_that_was_left_amid_its_waves(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody still holds the pass, as a traceback does: its loads are forgotten all the same."""
    cache = ExpertCache(opened.store, (), 9, mx.float32)
    with monkeypatch.context() as patch:
        SlowDisk(patch, 0.01)
        left = cache.waves(1, np.arange(EXPERTS))
        next(left)
        cache.prefetch(2, np.array([3, 6]), chance=1.0)
        check_all(opened, cache)
        cache.prefetch(2, np.array([3, 6]), chance=1.0)
        del left
        check_all(opened, cache)
    check_all(opened, cache)


def test_prefetch_amid_waves_lets_the_pass_go_on(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the guesses of the next layer are made: while this one's experts are read."""
    cache = ExpertCache(opened.store, (), 12, mx.float32)
    with monkeypatch.context() as patch:
        SlowDisk(patch, 0.005)
        for layer in range(LAYERS):
            waves = cache.waves(layer, np.array([1, 2, 5]))
            next(waves)
            cache.prefetch((layer + 1) % LAYERS, np.array([1, 7]), chance=1.0)
            for wave in waves:
                opened.check(layer, wave, mx.float32)
    one = cache.counters()[1]
    assert (one.early, one.early_hits + one.late) == (2, 1)
    check_all(opened, cache)


def test_ctrl_c_while_a_prefetch_is_waited_for(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ExpertCache(opened.store, (), 12, mx.float32)
    with monkeypatch.context() as patch:
        interrupt_the_wait(patch, Gate(patch, opened))
        cache.prefetch(1, np.array([2, 6]))
        with pytest.raises(KeyboardInterrupt):
            list(cache.waves(1, np.array([2, 3])))
    assert cache.resident(1).tolist() == []
    check_all(opened, cache)


# --- processes

RUN = """
import json, sys
from specdec.generation import Request, generate
from specdec.load import Settings, load
from specdec.target.streaming import Streaming

model, draft, direct = json.loads(sys.argv[1])
loaded = load(Settings(
    model, draft, pin_layers=0, cache_slots=9, context=200, streaming=Streaming(direct=direct)
))
print(json.dumps(generate(
    loaded.engine, loaded.tokenizer, Request((5, 6, 7, 8), 4, max_tokens=100)
).tokens))
"""


@pytest.mark.parametrize("direct", [False, True])
def test_two_processes_on_one_store(tmp_path: Path, direct: bool) -> None:
    pair = write_pair(tmp_path)
    line = [sys.executable, "-c", RUN, json.dumps([str(pair.target), str(pair.draft), direct])]
    running = [subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [json.loads(process.communicate(timeout=120)[0]) for process in running]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 1
