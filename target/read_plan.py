"""ReadPlan: from slices that are wanted to positioned reads, few and in order.

Slices are sorted by file and offset, those that touch are read together, and what is longer than
PIECE_BYTES is cut, so that several threads share it. A piece fills the memory of its slices at
once when the bytes may go there as they are; otherwise it passes through a bounce buffer: because
the disk wants aligned reads (`alignment` above 1) and file or memory are not, or because floats
change their dtype.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from specdec.target.floats import HOLDERS, convert
from specdec.target.store import Span

PIECE_BYTES = 512 << 10
# Buffers of one preadv at most (IOV_MAX of Linux and macOS).
MAX_BUFFERS = 1024


class Slice(NamedTuple):
    """A slice to read, and the memory that it fills.

    dtype: on disk, as a safetensors header spells it.
    target: contiguous, in the dtype of the bank (uint16 standing for bfloat16).
    """

    span: Span
    dtype: str
    target: np.ndarray


class _Part(NamedTuple):
    """Bytes of a piece, from `start` on, that become `target` (flat)."""

    start: int
    dtype: str
    target: np.ndarray

    @property
    def nbytes(self) -> int:
        return len(self.target) * HOLDERS[self.dtype].itemsize

    @property
    def converts(self) -> bool:
        return self.target.dtype != HOLDERS[self.dtype]

    def aligned(self, alignment: int) -> bool:
        """Whether a direct read may write to the target."""
        address = self.target.__array_interface__["data"][0]
        return address % alignment == 0 and self.nbytes % alignment == 0


@dataclass(frozen=True)
class Piece:
    """One read: `nbytes` bytes from `offset` of files[file]; `skip` of them lie before the first
    wanted one. No more of the file than `needed` bytes has to be there."""

    file: int
    offset: int
    nbytes: int
    skip: int
    needed: int
    parts: tuple[_Part, ...]
    bounced: bool

    def buffers(self, bounce: memoryview) -> list[memoryview]:
        """Where the bytes go, one buffer after the other."""
        if self.bounced:
            return [bounce[: self.nbytes]]
        return [part.target.view(np.uint8).data for part in self.parts]

    def deliver(self, bounce: memoryview) -> None:
        """From the bounce buffer, where it was needed, to the slices' memory."""
        if not self.bounced:
            return
        for part in self.parts:
            start = self.skip + part.start
            raw = np.frombuffer(bounce[start : start + part.nbytes], np.uint8)
            if part.converts:
                convert(raw.view(HOLDERS[part.dtype]), part.target)
            else:
                part.target.view(np.uint8)[...] = raw


def pieces(slices: Sequence[Slice], alignment: int = 1) -> Iterator[Piece]:
    """The reads that fill all slices, ascending by file and offset. Slices must not overlap."""
    run: list[tuple[int, _Part]] = []  # offset in the file, and what becomes of the bytes there
    file = end = -1
    for span, dtype, target in sorted(slices, key=lambda one: one.span):
        size = HOLDERS[dtype].itemsize
        flat, step = target.reshape(-1), PIECE_BYTES // size
        assert len(flat) * size == span.nbytes
        for first in range(0, len(flat), step):
            part = _Part(0, dtype, flat[first : first + step])
            at = span.offset + first * size
            start = run[0][0] if run else at
            near = span.file == file and 0 <= at - end < alignment
            if run and not (
                near and at + part.nbytes - start <= PIECE_BYTES and len(run) < MAX_BUFFERS
            ):
                yield _piece(file, run, alignment)
                run = []
            run.append((at, part))
            file, end = span.file, at + part.nbytes
    if run:
        yield _piece(file, run, alignment)


def _piece(file: int, run: list[tuple[int, _Part]], alignment: int) -> Piece:
    first, (last, part) = run[0][0], run[-1]
    end = last + part.nbytes
    start = first // alignment * alignment
    stop = -(-end // alignment) * alignment
    parts = tuple(_Part(at - first, part.dtype, part.target) for at, part in run)
    bounced = any(part.converts for part in parts)
    if alignment > 1 and not bounced:
        bounced = stop - start > end - first or not all(part.aligned(alignment) for part in parts)
    return Piece(file, start, stop - start, first - start, end - start, parts, bounced)
