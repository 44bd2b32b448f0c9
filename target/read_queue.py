"""ReadQueue: what a reader's threads share, and their work: pieces of requests in two lines.

Urgent pieces go first. Idle ones (prefetch) wait until none of them waits, and never take more than
half of the threads: an urgent one finds a thread free.
"""

import mmap
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from specdec import checkpoint
from specdec.errors import ExpertReadError
from specdec.target.read_files import ALIGNMENT, ReadFiles
from specdec.target.read_plan import PIECE_BYTES, Piece, Slice, pieces
from specdec.target.store import StoreFile


@dataclass(frozen=True)
class ReadCounters:
    """What a reader did since the counters were reset.

    bytes: returned by read calls, with what aligned reads take beside the slices.
    reads: finished read calls. seconds: wall time in which at least one read was under way.
    """

    bytes: int
    reads: int
    seconds: float


class Request:
    """Slices on their way. Their memory holds nothing to rely on until `wait` has returned."""

    def __init__(self, queue: "ReadQueue", todo: int, files: set[int]) -> None:
        self._queue, self._files = queue, files
        self._todo = todo
        self._over = threading.Event()
        self._error: BaseException | None = None
        self.dropped = False  # by an error or by `cancel`: what has not begun never does
        self.begun = False  # whether a thread has taken a piece of it: under the queue's lock
        self.bytes_read = 0
        if not todo:
            self._over.set()

    @property
    def done(self) -> bool:
        """Whether `wait` would return, or raise, at once."""
        return self._over.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Until everything is read, or for so long; whether it is.

        ExpertReadError when a read failed: it names file, offset, what was wanted and what came.
        """
        if not self._over.wait(seconds):
            return False
        if self._error is not None:
            raise self._error
        if self.dropped:
            raise ExpertReadError("the read was cancelled")
        for file in self._files:
            self._queue.files.check_unchanged(file)
        return True

    def cancel(self) -> None:
        """Let go of what has not begun, and wait for what has: afterwards nobody writes to the
        slices' memory any more."""
        self._queue.cancel([self])
        self._over.wait()

    @staticmethod
    def withdraw(requests: Sequence["Request"]) -> set["Request"]:
        """Cancel those of one reader's requests that no thread has begun, all at once, and wait
        for none: which these are."""
        return requests[0]._queue.cancel(requests, begun=False) if requests else set()

    def hurry(self) -> None:
        """What was asked for while idle has become urgent."""
        self._queue.hurry(self)

    def finish(self, count: int, error: BaseException | None) -> None:
        """A piece is over (the queue's business, under its lock)."""
        self.bytes_read += count
        self._todo -= 1
        if error is not None:
            self._error = self._error or error
            self.dropped = True
        if self._todo == 0:
            self._over.set()


class ReadQueue:
    """What readers' threads share: pieces in two lines, counters, descriptors."""

    def __init__(self, files: Sequence[StoreFile], depth: int, direct: bool) -> None:
        self.files, self._depth = ReadFiles(files, direct), depth
        self._lines: tuple[deque, deque] = deque(), deque()  # urgent, idle
        self._waiting = threading.Condition(threading.Lock())
        self._threads: list[threading.Thread] = []
        self._requests: set[Request] = set()  # that may not be over
        self._closed, self._under_way, self._since = False, 0, 0.0
        self._idle, self._most_idle = 0, max(1, depth // 2)  # threads at idle work, at most
        self.reset_counters()

    def submit(self, several: Sequence[Sequence[Slice]], idle: bool) -> list[Request]:
        requests, line = [], []
        for slices in several:
            todo = list(pieces(slices, self.files.alignment))
            requests.append(Request(self, len(todo), {piece.file for piece in todo}))
            line += [(requests[-1], piece) for piece in todo]
        with self._waiting:
            assert not self._closed, "submit to a closed reader"
            self._requests = {one for one in self._requests if not one.done} | set(requests)
            self._lines[idle].extend(line)
            wanted = self._under_way + len(self._lines[0]) + len(self._lines[1])
            while len(self._threads) < min(self._depth, wanted):
                thread = threading.Thread(target=self._work, name="expert reads", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._waiting.notify(min(len(line), self._most_idle) if idle else len(line))
        return requests

    def cancel(self, requests: Sequence[Request], begun: bool = True) -> set[Request]:
        """Let go, all at once, of what has not begun of these; without `begun` only of those of
        which nothing has. Which they are."""
        with self._waiting:
            gone = {one for one in requests if begun or not one.begun}
            for request in gone:
                request.dropped = request.dropped or not request.done
            for line in self._lines:
                kept = [entry for entry in line if entry[0] not in gone]
                for request in [entry[0] for entry in line if entry[0] in gone]:
                    request.finish(0, None)
                line.clear()
                line.extend(kept)
        return gone

    def drain(self) -> None:
        with self._waiting:
            requests = list(self._requests)
        for request in requests:
            request.cancel()

    def hurry(self, request: Request) -> None:
        with self._waiting:
            urgent, idle = self._lines
            urgent.extend(entry for entry in idle if entry[0] is request)
            kept = [entry for entry in idle if entry[0] is not request]
            self._waiting.notify(len(idle) - len(kept))
            idle.clear()
            idle.extend(kept)

    def counters(self) -> ReadCounters:
        with self._waiting:
            running = perf_counter() - self._since if self._under_way else 0.0
            return ReadCounters(self._bytes, self._reads, self._seconds + running)

    def reset_counters(self) -> None:
        with self._waiting:
            self._bytes, self._reads, self._seconds = 0, 0, 0.0
            self._since = perf_counter()

    def close(self) -> None:
        with self._waiting:
            self._closed = True
            for line in self._lines:
                for request, _ in line:
                    request.dropped = True
                    request.finish(0, None)
                line.clear()
            self._waiting.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():  # garbage is collected by any thread
                thread.join()
        self.files.close()

    def _work(self) -> None:
        """A thread's life."""
        bounce = memoryview(mmap.mmap(-1, PIECE_BYTES + 2 * ALIGNMENT))  # aligned to a page
        while True:
            with self._waiting:
                while not (self._lines[0] or (self._lines[1] and self._idle < self._most_idle)):
                    if self._closed:
                        return
                    self._waiting.wait()
                idle = not self._lines[0]
                request, piece = self._lines[idle].popleft()
                request.begun = True
                if request.dropped:
                    request.finish(0, None)
                    continue
                if self._under_way == 0:
                    self._since = perf_counter()
                self._under_way += 1
                self._idle += idle
            progress = _Progress()
            error: BaseException | None = None
            try:
                self._read(piece, bounce, progress)
            except BaseException as raised:  # an interrupt too belongs to whoever waits
                error = raised
            with self._waiting:
                self._under_way -= 1
                self._idle -= idle
                if self._under_way == 0:
                    self._seconds += perf_counter() - self._since
                self._bytes += progress.bytes
                self._reads += progress.reads
                request.finish(progress.bytes, error)
            del request, piece  # or this thread would keep their memory until the next

    def _read(self, piece: Piece, bounce: memoryview, progress: "_Progress") -> None:
        """Fill one piece; partial reads are continued."""
        path, buffers = self.files.path(piece.file), piece.buffers(bounce)
        while progress.bytes < piece.needed:
            at = piece.offset + progress.bytes
            try:
                count = checkpoint.read_at(self.files.descriptors[piece.file], buffers, at)
            except OSError as error:
                way_out = self.files.way_out(error)
                raise ExpertReadError(
                    f"{path}: reading {piece.needed - progress.bytes} bytes at byte {at} failed: "
                    f"{error.strerror or error}{way_out}"
                ) from error
            progress.reads += 1
            if count <= 0 or (
                count % self.files.alignment and progress.bytes + count < piece.needed
            ):
                raise ExpertReadError(
                    f"{path}: short read at byte {at}: wanted "
                    f"{piece.needed - progress.bytes} bytes, got {max(count, 0)}; the file is "
                    "truncated"
                )
            progress.bytes += count
            buffers = _after(buffers, count)
        piece.deliver(bounce)


@dataclass
class _Progress:
    """Of one piece, told also when it fails."""

    bytes: int = 0
    reads: int = 0


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """What of the buffers is left once `count` bytes are in."""
    at = 0
    while at < len(buffers) and count >= len(buffers[at]):
        count -= len(buffers[at])
        at += 1
    rest = buffers[at:]
    return [rest[0][count:], *rest[1:]] if rest and count else rest
