"""The reader of experts: right bytes in any mode, and every fault of a disk told in words."""

import errno
import fcntl
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import checkpoint as checkpoint_module
from specdec.errors import CheckpointError, ExpertReadError
from specdec.target.expert_reader import ExpertReader
from specdec.target.read_plan import MAX_BUFFERS, PIECE_BYTES, Slice, pieces
from specdec.target.store import Span, StoreFile

SIZE = 3 * PIECE_BYTES + 1234


def can_read_directly(folder: Path) -> bool:
    file = folder / "probe"
    file.write_bytes(bytes(4096))
    try:
        os.close(os.open(file, os.O_RDONLY | getattr(os, "O_DIRECT", 0)))
    except OSError:
        return False
    return True


class Disk:
    """Two files of random bytes, and a reader of them."""

    def __init__(self, folder: Path, depth: int = 4, direct: bool = False) -> None:
        rng = np.random.default_rng(5)
        self.bytes = [rng.integers(0, 256, SIZE, dtype=np.uint8) for _ in range(2)]
        self.paths = [folder / f"file{i}.bin" for i in range(2)]
        for path, data in zip(self.paths, self.bytes, strict=True):
            path.write_bytes(data.tobytes())
        self.descriptors = [os.open(path, os.O_RDONLY) for path in self.paths]
        files = [StoreFile(*pair) for pair in zip(self.paths, self.descriptors, strict=True)]
        self.reader = ExpertReader(files, depth, direct)

    def wanted(self, file: int, offset: int, count: int) -> Slice:
        return Slice(Span(file, offset, 4 * count), "U32", np.zeros(count, np.uint32))

    def check(self, slices: list[Slice]) -> None:
        for span, _, target in slices:
            part = self.bytes[span.file][span.offset : span.offset + span.nbytes]
            assert np.array_equal(target.view(np.uint8), part)

    def close(self) -> None:
        self.reader.close()
        for descriptor in self.descriptors:
            os.close(descriptor)


@pytest.fixture(params=["buffered", "direct"])
def disk(request, tmp_path):
    direct = request.param == "direct"
    if direct and not can_read_directly(tmp_path):
        pytest.skip("this file system has no direct reads")
    disk = Disk(tmp_path, direct=direct)
    yield disk
    disk.close()


def test_slices_anywhere_are_filled(disk):
    rng = np.random.default_rng(0)
    for _ in range(20):
        slices, at = [], 0
        while True:
            at += int(rng.choice([0, 0, 4, 100, 4096, 70000]))
            count = int(rng.choice([1, 7, 1024, 8192, PIECE_BYTES // 4, PIECE_BYTES // 4 + 5]))
            if at + 4 * count > SIZE:
                break
            slices.append(disk.wanted(int(rng.integers(2)), at, count))
            at += 4 * count
        slices = [slices[i] for i in rng.permutation(len(slices))]
        assert disk.reader.submit(slices).wait()
        disk.check(slices)
    counters = disk.reader.counters()
    assert counters.bytes > 0
    assert counters.reads > 0
    assert counters.seconds > 0
    disk.reader.reset_counters()
    assert disk.reader.counters().bytes == 0


def test_nothing_to_read_is_read_at_once(disk):
    request = disk.reader.submit([])
    assert request.done
    assert request.wait()


@given(
    gaps=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5000)), max_size=40),
    alignment=st.sampled_from([1, 4096]),
)
@settings(max_examples=50, deadline=None)
def test_reads_ascend_and_merge_what_touches(gaps, alignment):
    slices, at = [], 12
    for gap, count in gaps:
        at += gap * 4
        slices.append(Slice(Span(0, at, 4 * count), "U32", np.zeros(count, np.uint32)))
        at += 4 * count
    reads = list(pieces(slices[::-1], alignment))
    assert sum(part.nbytes for piece in reads for part in piece.parts) == sum(
        one.span.nbytes for one in slices
    )
    ends = [piece.parts[0].at for piece in reads]
    assert ends == sorted(ends)
    for piece in reads:
        assert piece.offset % alignment == 0
        assert piece.nbytes % alignment == 0
        assert piece.needed <= piece.nbytes <= PIECE_BYTES + 2 * 4096
        assert len(piece.parts) <= MAX_BUFFERS
    if alignment == 1 and all(gap == 0 for gap, _ in gaps) and at - 12 <= PIECE_BYTES:
        assert len(reads) <= 1


def test_a_slice_longer_than_a_piece_is_shared_by_threads():
    count = PIECE_BYTES  # of four bytes each
    one = Slice(Span(0, 4, 4 * count), "U32", np.zeros(count, np.uint32))
    assert [piece.needed for piece in pieces([one])] == [PIECE_BYTES] * 4


@pytest.mark.parametrize("on_disk", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("resident", [np.uint16, np.float16, np.float32])
def test_floats_arrive_in_the_dtype_of_their_memory(disk, on_disk, resident):
    values = np.random.default_rng(1).standard_normal(70_001).astype(np.float32)
    raw: np.ndarray = values if on_disk == "F32" else values.astype(np.float16)
    exact = raw.astype(np.float32)
    if on_disk == "BF16":
        raw = (values.view(np.uint32) >> 16).astype(np.uint16)
        exact = (raw.astype(np.uint32) << 16).view(np.float32)
    with disk.paths[0].open("r+b") as file:
        file.seek(20)
        file.write(raw.tobytes())
    reader = ExpertReader([StoreFile(disk.paths[0], disk.descriptors[0])], 3, disk.reader.direct)
    target = np.zeros(len(values), resident)
    reader.submit([Slice(Span(0, 20, raw.nbytes), on_disk, target)]).wait()
    if resident == np.uint16:
        wide = (target.astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_allclose(wide, exact, rtol=2**-8)
    else:
        assert np.array_equal(target, exact.astype(resident))
    reader.close()


def test_partial_reads_are_continued(disk, monkeypatch):
    real = checkpoint_module.read_at

    def partial(descriptor, buffers, offset):
        return real(descriptor, [buffers[0][:4096]], offset)

    monkeypatch.setattr(checkpoint_module, "read_at", partial)
    slices = [disk.wanted(0, 4, 40_000), disk.wanted(0, 160_004, 10_000)]
    disk.reader.submit(slices).wait()
    disk.check(slices)


# --- faults


def test_a_short_read_names_file_offset_wanted_and_got(disk):
    os.truncate(disk.paths[1], 50_000)
    slices = [disk.wanted(0, 0, 100), disk.wanted(1, 49_152, 1000)]
    with pytest.raises(
        ExpertReadError, match=r"file1\.bin: short read at byte \d+: wanted \d+ bytes, got \d+"
    ):
        disk.reader.submit(slices).wait()


def test_a_disk_error_is_told_and_the_next_request_works(disk, monkeypatch):
    with monkeypatch.context() as patch:

        def broken(*arguments):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        patch.setattr(checkpoint_module, "read_at", broken)
        request = disk.reader.submit([disk.wanted(0, 4 * i * PIECE_BYTES // 8, 9) for i in (0, 3)])
        with pytest.raises(ExpertReadError, match=r"file0\.bin: reading .* at byte .*Input/output"):
            request.wait()
    again = [disk.wanted(0, 8, 100)]
    disk.reader.submit(again).wait()
    disk.check(again)


def test_a_file_overwritten_while_open_is_told(disk):
    time.sleep(0.02)  # file systems count time in ticks
    with disk.paths[0].open("r+b") as file:
        file.write(b"other")
    with pytest.raises(ExpertReadError, match=r"file0\.bin: was changed while it was open"):
        disk.reader.submit([disk.wanted(0, 64, 4)]).wait()
    other = [disk.wanted(1, 64, 4)]
    disk.reader.submit(other).wait()
    disk.check(other)


def test_a_file_replaced_while_open_is_read_as_it_was(disk, tmp_path):
    (tmp_path / "new").write_bytes(bytes(SIZE))
    os.replace(tmp_path / "new", disk.paths[0])
    slices = [disk.wanted(0, 64, 5000)]
    disk.reader.submit(slices).wait()
    disk.check(slices)


def test_a_file_replaced_before_direct_reads_began_is_refused(disk, tmp_path):
    if not disk.reader.direct:
        pytest.skip("buffered reads use the descriptor that is open")
    (tmp_path / "new").write_bytes(bytes(SIZE))
    os.replace(tmp_path / "new", disk.paths[0])
    with pytest.raises(CheckpointError, match=r"file0\.bin: was replaced or changed"):
        ExpertReader([StoreFile(disk.paths[0], disk.descriptors[0])], 2, direct=True)


def test_a_file_system_without_direct_reads_is_named(tmp_path, monkeypatch):
    disk = Disk(tmp_path)
    real = os.open

    def refusing(path, flags, *rest):
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest)

    if not hasattr(os, "O_DIRECT"):
        pytest.skip("no O_DIRECT here")
    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(CheckpointError, match=r"--io direct is refused: .*; use --io buffered"):
        ExpertReader([StoreFile(disk.paths[0], disk.descriptors[0])], 2, direct=True)
    disk.close()


class Macos:
    """The calls that a Mac has in place of O_DIRECT."""

    F_NOCACHE = 48  # as <fcntl.h> has it there

    def __init__(self, patch, error=None):
        self.told, self.error = [], error
        patch.delattr(os, "O_DIRECT", raising=False)
        patch.setattr(fcntl, "F_NOCACHE", self.F_NOCACHE, raising=False)
        patch.setattr(fcntl, "fcntl", self)

    def __call__(self, descriptor, command, argument=0):
        self.told.append((descriptor, command, argument))
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        return 0


def test_on_a_mac_direct_reads_ask_for_no_cache(tmp_path, monkeypatch):
    """Descriptors of its own, told F_NOCACHE; reads need no alignment there, so none is paid."""
    macos = Macos(monkeypatch)
    disk = Disk(tmp_path, direct=True)
    descriptors = disk.reader._queue.files.descriptors
    assert macos.told == [(descriptor, Macos.F_NOCACHE, 1) for descriptor in descriptors]
    assert len(set(descriptors) | set(disk.descriptors)) == 2 * len(disk.descriptors)
    slices = [disk.wanted(0, 4097, 5001), disk.wanted(1, 3, 777)]
    assert disk.reader.submit(slices).wait(10)
    disk.check(slices)
    assert disk.reader.counters().bytes == 4 * (5001 + 777)
    disk.reader.close()
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    disk.close()


def test_a_mac_that_refuses_is_named_and_nothing_stays_open(tmp_path, monkeypatch):
    disk, before = Disk(tmp_path), len(os.listdir("/dev/fd"))
    Macos(monkeypatch, errno.ENOTSUP)
    with pytest.raises(CheckpointError, match=r"file0\.bin: --io direct is refused: .*supported"):
        ExpertReader([StoreFile(disk.paths[0], disk.descriptors[0])], 2, direct=True)
    assert len(os.listdir("/dev/fd")) == before
    disk.close()


def test_a_system_without_either_is_named(tmp_path, monkeypatch):
    disk = Disk(tmp_path)
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    monkeypatch.delattr(fcntl, "F_NOCACHE", raising=False)
    with pytest.raises(CheckpointError, match="this system has no reads past its page cache"):
        ExpertReader([StoreFile(disk.paths[0], disk.descriptors[0])], 2, direct=True)
    disk.close()


def test_a_file_system_in_memory_reads_or_says_that_it_cannot():
    """tmpfs takes O_DIRECT in some kernels only."""
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no tmpfs here")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        if not can_read_directly(Path(folder)):
            with pytest.raises(CheckpointError, match=r"direct is refused: .*; use --io buffered"):
                Disk(Path(folder), direct=True)
            return
        disk = Disk(Path(folder), direct=True)
        slices = [disk.wanted(0, 100, 5000)]
        disk.reader.submit(slices).wait()
        disk.check(slices)
        disk.close()


def test_a_direct_read_that_the_file_system_refuses_names_the_way_out(tmp_path, monkeypatch):
    """Some take O_DIRECT when a file is opened, and refuse the reads."""
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("no O_DIRECT here")
    disk = Disk(tmp_path, direct=True)

    def refused(*arguments):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(checkpoint_module, "read_at", refused)
    with pytest.raises(ExpertReadError, match=r"Invalid argument; use --io buffered"):
        disk.reader.submit([disk.wanted(0, 0, 100)]).wait()
    disk.close()


class Gate:
    """Reads that wait until they are let through."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.real, self.opened = checkpoint_module.read_at, threading.Event()
        self.begun, self.calls = threading.Semaphore(0), 0
        patch.setattr(checkpoint_module, "read_at", self)

    def __call__(self, *arguments):
        self.calls += 1
        self.begun.release()
        assert self.opened.wait(10)
        return self.real(*arguments)


def spread(disk: Disk, count: int) -> list[Slice]:
    """Slices that no read serves two of."""
    return [disk.wanted(0, 16384 * i, 100) for i in range(count)]


def test_a_cancelled_request_lets_go_of_what_has_not_begun(disk, monkeypatch):
    gate = Gate(monkeypatch)
    slices = spread(disk, 20)
    request = disk.reader.submit(slices)
    for _ in range(4):
        gate.begun.acquire()
    assert not request.done
    assert not request.wait(0.01)
    threading.Timer(0.05, gate.opened.set).start()
    request.cancel()  # returns once the four reads under way are over
    assert gate.calls == 4
    before = [one.target.copy() for one in slices]
    with pytest.raises(ExpertReadError, match="cancelled"):
        request.wait()
    time.sleep(0.05)
    assert all(np.array_equal(a, b.target) for a, b in zip(before, slices, strict=True))
    again = spread(disk, 20)
    disk.reader.submit(again).wait()
    disk.check(again)


def test_urgent_reads_overtake_idle_ones_and_find_a_thread_free(disk, monkeypatch):
    gate = Gate(monkeypatch)
    idle = disk.reader.submit(spread(disk, 12), idle=True)
    for _ in range(2):
        gate.begun.acquire()
    assert not gate.begun.acquire(timeout=0.05)  # idle work takes half of the four threads
    order: list[int] = []

    def recorded(descriptor, buffers, offset):
        order.append(offset)
        return gate.real(descriptor, buffers, offset)

    monkeypatch.setattr(checkpoint_module, "read_at", recorded)
    wanted = [disk.wanted(0, 16384 * 50, 100)]
    assert disk.reader.submit(wanted).wait(10)
    disk.check(wanted)
    assert not idle.done
    assert order == [16384 * 50]
    gate.opened.set()
    assert idle.wait(10)


def test_what_was_idle_can_be_hurried(disk, monkeypatch):
    gate = Gate(monkeypatch)
    first = disk.reader.submit(spread(disk, 8), idle=True)
    other = [disk.wanted(1, 0, 10)]
    second = disk.reader.submit(other, idle=True)
    second.hurry()
    gate.opened.set()
    assert second.wait()
    assert first.wait()
    disk.check(other)


def test_an_interrupt_in_a_thread_reaches_whoever_waits(disk, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "read_at", interrupted)
        with pytest.raises(KeyboardInterrupt):
            disk.reader.submit(spread(disk, 3)).wait()
    again = spread(disk, 3)
    disk.reader.submit(again).wait()
    disk.check(again)


def test_a_closed_reader_drops_what_waits_and_ends_its_threads(disk, monkeypatch):
    gate = Gate(monkeypatch)
    request = disk.reader.submit(spread(disk, 20))
    gate.begun.acquire()
    threading.Timer(0.05, gate.opened.set).start()
    threads = threading.active_count()
    disk.reader.close()
    assert request.done
    assert threading.active_count() < threads


def test_a_reader_nobody_holds_ends_its_threads(tmp_path):
    disk = Disk(tmp_path)
    before = threading.active_count()
    reader = ExpertReader([StoreFile(disk.paths[0], disk.descriptors[0])], 4)
    reader.submit([disk.wanted(0, 0, 1000)]).wait()
    assert threading.active_count() > before
    del reader
    assert threading.active_count() == before
    disk.close()
