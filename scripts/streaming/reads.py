"""Reads: what the engine's reader gets from the disk, against a loop that does nothing but read.

The loop stands for fio: as many threads as the queue is deep, each with one positioned direct read
under way, of the same blocks in the same order into aligned memory that nobody looks at. The reader
does that and puts every slice where it belongs, scales and biases converted.

`stream`: many experts of all layers asked for at once. `burst`: a few experts of one layer at a
time, each time waited for, as decoding does. Both read random experts of the repacked folder;
`unpacked` is the reader's stream from the checkpoint as it is, against the loop's of the repacked.

Everything is read once before, and what goes first changes from repeat to repeat: below a virtual
machine's disk may lie a cache that no flag reaches.
"""

import mmap
import os
import statistics
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from scripts.streaming.checkpoint import Folders
from specdec.checkpoint import Checkpoint
from specdec.kernels.array import choose_backend
from specdec.target.config import TargetConfig
from specdec.target.expert_bank import ExpertBank
from specdec.target.expert_reader import ExpertReader
from specdec.target.expert_store import ExpertStore
from specdec.target.read_files import ALIGNMENT
from specdec.target.read_plan import PIECE_BYTES, Piece, Slice, pieces
from specdec.target.repacked_store import open_store
from specdec.units import table

BURST = 4
BAR = 0.80


class Source:
    """A folder's experts, and lists of slices to read."""

    def __init__(self, folder: Path, open_files: ExitStack, count: int) -> None:
        checkpoint = open_files.enter_context(Checkpoint.open(folder))
        self.store: ExpertStore = open_store(checkpoint, TargetConfig.of(checkpoint))
        geometry = self.store.geometry(self.store.layers[0])
        self.bank = ExpertBank(geometry, count, choose_backend(mx.bfloat16).dtype)
        self.bytes = geometry.bytes_on_disk
        self.files = [os.open(file.path, os.O_RDONLY | _direct()) for file in self.store.files]
        for file in self.files:
            open_files.callback(os.close, file)

    def slices(self, wanted: Sequence[tuple[int, int]]) -> list[Slice]:
        """Of experts (layer, id), into the bank's first slots."""
        return [
            Slice(span, tensor.dtype, view[slot])
            for slot, (layer, expert) in enumerate(wanted)
            for span, tensor, view in zip(
                self.store.spans(layer, expert),
                self.store.geometry(layer).tensors,
                self.bank.views,
                strict=True,
            )
        ]

    def by_reader(self, depth: int) -> Callable[[list[list[Slice]]], float]:
        """Seconds that the reader takes for lists of slices, one after the other."""
        reader = ExpertReader(self.store.files, depth, direct=True)

        def read(lists: list[list[Slice]]) -> float:
            start = perf_counter()
            for slices in lists:
                reader.submit(slices).wait()
            return perf_counter() - start

        return read

    def by_loop(self, depth: int) -> Callable[[list[list[Slice]]], float]:
        """Seconds that the bare loop takes for the same blocks."""
        loop = Loop(self.files, depth)

        def read(lists: list[list[Slice]]) -> float:
            blocks = [list(pieces(slices, ALIGNMENT)) for slices in lists]
            return loop.read(blocks)

        return read


class Loop:
    """Threads that read blocks and do nothing else."""

    def __init__(self, files: Sequence[int], depth: int) -> None:
        self._files, self._todo = files, deque[Piece]()
        self._begin, self._end = threading.Barrier(depth + 1), threading.Barrier(depth + 1)
        for _ in range(depth):
            threading.Thread(target=self._work, daemon=True).start()

    def read(self, lists: list[list[Piece]]) -> float:
        start = perf_counter()
        for blocks in lists:
            self._todo.extend(blocks)
            self._begin.wait()
            self._end.wait()
        return perf_counter() - start

    def _work(self) -> None:
        buffer = memoryview(mmap.mmap(-1, PIECE_BYTES + 2 * ALIGNMENT))
        while True:
            self._begin.wait()
            while True:
                try:
                    block = self._todo.popleft()
                except IndexError:
                    break
                got = os.preadv(self._files[block.file], [buffer[: block.nbytes]], block.offset)
                assert got >= block.needed
            self._end.wait()


def run(folders: Folders, depths: Sequence[int], repeats: int, experts: int) -> dict[str, Any]:
    """Bytes per second by queue depth, and the reader's share of the loop's."""
    print(f"\n== reads: {experts} random experts a repeat, {repeats} repeats, direct, medians")
    rng = np.random.default_rng(0)
    with ExitStack() as stack:
        packed = Source(folders.repacked, stack, experts)
        plain = Source(folders.model, stack, experts)
        layers, each = packed.store.layers, packed.store.num_experts
        kinds = {d: (packed.by_reader(d), packed.by_loop(d), plain.by_reader(d)) for d in depths}
        seconds: dict[tuple[int, str], list[float]] = {}
        everything = [(layer, expert) for layer in layers for expert in range(each)]
        for source in (packed, plain):
            for at in range(0, len(everything), experts):
                source.by_loop(max(depths))([source.slices(everything[at : at + experts])])

        def draw() -> list[tuple[int, int]]:
            return [everything[at] for at in rng.permutation(len(everything))[:experts]]

        def bursts() -> list[list[tuple[int, int]]]:
            return [
                [(layer, int(e)) for e in rng.permutation(each)[:BURST]]
                for layer in rng.choice(layers, experts // BURST)
            ]

        for repeat in range(repeats):
            for depth, (reader, loop, other) in kinds.items():
                reads: list[tuple[str, Callable, list[list[Slice]]]] = [
                    ("stream", reader, [packed.slices(draw())]),
                    ("stream, loop", loop, [packed.slices(draw())]),
                    ("burst", reader, [packed.slices(one) for one in bursts()]),
                    ("burst, loop", loop, [packed.slices(one) for one in bursts()]),
                    ("unpacked", other, [plain.slices(draw())]),
                ]
                for name, read, lists in reads[:: -1 if repeat % 2 else 1]:
                    seconds.setdefault((depth, name), []).append(read(lists))
        rates = {
            key: experts * packed.bytes / statistics.median(all_of)
            for key, all_of in seconds.items()
        }
        ratios = {
            key: statistics.median(
                b / a
                for a, b in zip(all_of, seconds[key[0], f"{_like(key[1])}, loop"], strict=True)
            )
            for key, all_of in seconds.items()
            if not key[1].endswith("loop")
        }
    figures: dict[str, Any] = {
        "block_bytes": PIECE_BYTES,
        "expert_bytes": packed.bytes,
        "depths": {},
    }
    rows: list[tuple[str, ...]] = [
        ("depth", "stream GB/s", "loop", "ratio", "burst", "loop", "ratio", "unpacked", "ratio")
    ]
    for depth in depths:
        cells: list[str] = []
        of_depth: dict[str, dict[str, float]] = {}
        for name in ("stream", "burst", "unpacked"):
            rate, ratio = rates[depth, name], ratios[depth, name]
            of_depth[name] = {"bytes_per_second": rate, "ratio": ratio}
            cells.append(f"{rate / 1e9:.2f}")
            if name != "unpacked":
                of_depth[name]["loop"] = rates[depth, f"{name}, loop"]
                cells.append(f"{of_depth[name]['loop'] / 1e9:.2f}")
            cells.append(f"{ratio:.2f}")
        figures["depths"][depth] = of_depth
        rows.append((str(depth), *cells))
    print(table(rows))
    best = max(depths, key=lambda depth: rates[depth, "burst"])
    figures["best_depth"] = best
    figures["bandwidth"] = max(rates[depth, "stream"] for depth in depths)
    worst = min(ratios[depth, "stream"] for depth in depths)
    figures["met"] = worst >= BAR
    print(
        f"BAR reader against loop, stream: {worst:.2f} at worst, at least {BAR}: "
        f"{'met' if figures['met'] else 'NOT MET'}; bursts are fastest at depth {best}"
    )
    return figures


def _like(name: str) -> str:
    """The loop that a kind of reading is held against."""
    return "burst" if name == "burst" else "stream"


def _direct() -> int:
    return getattr(os, "O_DIRECT", 0)
