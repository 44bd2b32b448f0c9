"""ExpertReader: experts' bytes from disk to memory, by several threads at a time.

`submit` takes slices and returns at once; the Request tells when their memory is full. Reads are
sorted, merged and cut by target/read_plan.py. What is asked for while idle (prefetch) waits until
nothing urgent does, and never takes more than half of the threads: urgent reads find one free.

A read that ends early, an I/O error and a file that has been changed since it was opened are an
ExpertReadError, and nothing of that request counts as read. A file that was replaced is still
read as it was opened.
"""

import weakref
from collections.abc import Sequence

from specdec.target.read_files import ALIGNMENT
from specdec.target.read_plan import PIECE_BYTES, Slice
from specdec.target.read_queue import ReadCounters, ReadQueue, Request
from specdec.target.store import StoreFile
from specdec.target.streaming import QUEUE_DEPTH

# A thread's own memory beside its bounce buffer: the stack it touches, and conversions.
THREAD_BYTES = 512 << 10


def reader_bytes(depth: int) -> int:
    """Memory that a reader of this queue depth takes."""
    return depth * (PIECE_BYTES + 2 * ALIGNMENT + THREAD_BYTES)


class ExpertReader:
    """Reads from a store's files with `depth` reads under way at most."""

    def __init__(
        self, files: Sequence[StoreFile], depth: int = QUEUE_DEPTH, direct: bool = False
    ) -> None:
        """CheckpointError where direct reads are asked for and cannot be had."""
        assert depth >= 1
        self.depth, self.direct = depth, direct
        self._queue = ReadQueue(files, depth, direct)
        # The threads hold the queue, not the reader: they end with it.
        self._close = weakref.finalize(self, self._queue.close)

    def submit(self, slices: Sequence[Slice], idle: bool = False) -> Request:
        """Begin to read. With `idle`, once nothing urgent waits."""
        return self._queue.submit([slices], idle)[0]

    def submit_each(self, several: Sequence[Sequence[Slice]]) -> list[Request]:
        """Begin to read once nothing urgent waits: a request each."""
        return self._queue.submit(several, True)

    def drain(self) -> None:
        """Cancel every request: afterwards no memory is written to any more."""
        self._queue.drain()

    def counters(self) -> ReadCounters:
        return self._queue.counters()

    def reset_counters(self) -> None:
        self._queue.reset_counters()

    def close(self) -> None:
        """End the threads and close the files opened here; requests under way are dropped."""
        self._close()
