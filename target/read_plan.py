"""ReadPlan: from slices that are wanted to positioned reads, few and in order.

Slices are sorted by file and offset, those that touch are read together, and what is longer than
PIECE_BYTES is cut, so that several threads share it. A piece fills the memory of its slices at
once when the bytes may go there as they are; otherwise it passes through a bounce buffer: because
the disk wants aligned reads (`alignment` above 1) and file or memory are not, or because floats
change their dtype.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
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
    """`nbytes` bytes from `at` in the file on, that become `target` (flat)."""

    at: int
    nbytes: int
    dtype: str
    target: np.ndarray

    @property
    def converts(self) -> bool:
        return self.target.dtype != HOLDERS[self.dtype]

    def aligned(self, alignment: int) -> bool:
        """Whether a direct read may write to the target."""
        address = self.target.__array_interface__["data"][0]
        return address % alignment == 0 and self.nbytes % alignment == 0


@dataclass(frozen=True)
class Piece:
    """One read: `nbytes` bytes from `offset` of files[file]. No more of the file than `needed`
    bytes has to be there."""

    file: int
    offset: int
    nbytes: int
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
            start = part.at - self.offset
            raw = np.frombuffer(bounce[start : start + part.nbytes], np.uint8)
            if part.converts:
                convert(raw.view(HOLDERS[part.dtype]), part.target)
            else:
                part.target.view(np.uint8)[...] = raw


def pieces(slices: Sequence[Slice], alignment: int = 1) -> Iterator[Piece]:
    """The reads that fill all slices, ascending by file and offset. Slices must not overlap.

    Made before every wait for experts: kept short of steps.
    """
    run: list[_Part] = []
    file = start = end = -1
    for one in sorted(slices, key=itemgetter(0)):
        there = one.span.file
        for part in _parts(*one):
            after = part.at + part.nbytes
            near = there == file and 0 <= part.at - end < alignment
            if run and not (near and after - start <= PIECE_BYTES and len(run) < MAX_BUFFERS):
                yield _piece(file, run, alignment)
                run = []
            if not run:
                start = part.at
            run.append(part)
            file, end = there, after
    if run:
        yield _piece(file, run, alignment)


def _parts(span: Span, dtype: str, target: np.ndarray) -> list[_Part]:
    """A slice, cut into what one read may bring."""
    size, flat = HOLDERS[dtype].itemsize, target.reshape(-1)
    assert flat.size * size == span.nbytes
    if span.nbytes <= PIECE_BYTES:
        return [_Part(span.offset, span.nbytes, dtype, flat)]
    step = PIECE_BYTES // size
    cut = [(first * size, flat[first : first + step]) for first in range(0, flat.size, step)]
    return [_Part(span.offset + at, part.size * size, dtype, part) for at, part in cut]


def _piece(file: int, run: list[_Part], alignment: int) -> Piece:
    first, end = run[0].at, run[-1].at + run[-1].nbytes
    start = first // alignment * alignment
    stop = -(-end // alignment) * alignment
    bounced = any(part.converts for part in run)
    if alignment > 1 and not bounced:
        bounced = stop - start > end - first or not all(part.aligned(alignment) for part in run)
    return Piece(file, start, stop - start, end - start, tuple(run), bounced)
