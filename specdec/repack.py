"""Repacking: a model folder whose experts stand in one file per layer, made from another folder.

Order: journal, the small files, every tensor that is not an expert, a file per layer, and last the
index, atomically. The journal says from what and how the folder is made and which files are
finished with which hash. Run again, a repack keeps the finished files whose size and hash are right
and does the rest; from another model, or with other places, it is refused.

Refuses: a folder that is not empty and no repack of this model, one in which another process
repacks, too little room on the disk, and a source that is repacked already.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from specdec.checkpoint import Checkpoint
from specdec.durable import PIECE_BYTES, DurableFile, sha256_of, write_durably
from specdec.errors import ExpertReadError, RepackError
from specdec.repack_plan import RepackPlan, identity
from specdec.shards import TensorInfo, read_json
from specdec.target.expert_store import ExpertStore
from specdec.target.repacked_index import (
    INDEX,
    JOURNAL,
    FileEntry,
    LayerFile,
    RepackedIndex,
    encode,
)
from specdec.units import size

DENSE = "model.safetensors"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Repacked:
    """What a repack did. kept: files of an earlier, interrupted run that were found good."""

    index: RepackedIndex
    written: int
    kept: tuple[str, ...]


def repack(
    checkpoint: Checkpoint,
    store: ExpertStore,
    out: Path,
    places: Mapping[int, Sequence[int]] | None = None,
    order: str = "identity",
    on_progress: Progress | None = None,
) -> Repacked:
    """Write the folder `out`. on_progress(bytes done, bytes in all), kept ones included.

    RepackError as the module says, and when the disk is full or fails: what is finished stays for
    the next run. ExpertReadError when the source cannot be read.
    """
    if checkpoint.folder.resolve() == out.resolve():
        raise RepackError(f"{out}: is the model itself; repack writes another folder")
    plan = RepackPlan.of(checkpoint, store, places, order)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RepackError(f"{out}: cannot be made: {error.strerror}") from error
    with _locked(out):
        return _Work(checkpoint, store, out, plan, on_progress).run()


class _Work:
    """One repack under way."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        store: ExpertStore,
        out: Path,
        plan: RepackPlan,
        on_progress: Progress | None,
    ) -> None:
        self.checkpoint, self.store, self.out, self.plan = checkpoint, store, out, plan
        self.files: dict[str, FileEntry] = {}
        self.done, self.written, self.on_progress = 0, 0, on_progress

    def run(self) -> Repacked:
        finished = self._begin()
        kept, plan = [], self.plan
        jobs: list[tuple[str, int, Callable[[DurableFile], None]]] = [
            *((path.name, path.stat().st_size, partial(_copy, path)) for path in plan.small),
            (DENSE, plan.dense_bytes, self._write_dense),
            *((one.file, one.nbytes, partial(self._write_layer, one)) for one in plan.layers),
        ]
        left = sum(nbytes for name, nbytes, _ in jobs if name not in finished)
        free = shutil.disk_usage(self.out).free
        if left > free:
            raise RepackError(f"{self.out}: {size(left)} are to be written, {size(free)} are free")
        for name, _, write in jobs:
            if name in finished and self._still_good(name, finished[name]):
                kept.append(name)
                continue
            with DurableFile(self.out / name, RepackError) as file:
                write(file)
                file.keep()
            self.files[name] = FileEntry(file.nbytes, file.sha256)
            self.written += file.nbytes
            self._note()
        self._check_source()
        index = RepackedIndex(plan.source, plan.order, plan.layers, self.files)
        write_durably(self.out / INDEX, encode(index.to_json()), RepackError)
        (self.out / JOURNAL).unlink(missing_ok=True)
        return Repacked(RepackedIndex.read(self.out), self.written, tuple(kept))

    def _begin(self) -> dict[str, FileEntry]:
        """Files that an earlier run of the same repack finished; RepackError for anything else."""
        wanted = _plain(self.plan.to_json())
        for draft in self.out.glob(".*.part"):  # of a process that was killed
            draft.unlink(missing_ok=True)
        if (self.out / INDEX).exists():
            index = RepackedIndex.read(self.out)
            if {k: v for k, v in _plain(index.to_json()).items() if k != "files"} == wanted:
                return dict(index.files)
            raise RepackError(
                f"{self.out}: holds a whole repack of another model or in other places"
            )
        journal = self.out / JOURNAL
        if journal.exists():
            raw = read_json(journal)
            if raw.get("plan") != wanted:
                raise RepackError(
                    f"{self.out}: holds the unfinished repack of another model, of one that has "
                    "changed since, or in other places: remove the folder or choose another"
                )
            try:
                found = {str(name): FileEntry(*one) for name, one in raw["finished"].items()}
            except (KeyError, TypeError, AttributeError) as error:
                raise RepackError(f"{journal}: broken: {error!r}; remove the folder") from error
            return {name: one for name, one in found.items() if (self.out / name).is_file()}
        if any(path.name[0] != "." for path in self.out.iterdir()):
            raise RepackError(f"{self.out}: is not empty and no repack of this model")
        self._note()
        return {}

    def _note(self) -> None:
        """Write down what is finished."""
        finished = {name: [one.size, one.sha256] for name, one in self.files.items()}
        document = {"plan": self.plan.to_json(), "finished": finished}
        write_durably(self.out / JOURNAL, encode(document), RepackError)

    def _still_good(self, name: str, entry: FileEntry) -> bool:
        path = self.out / name
        if path.stat().st_size != entry.size:
            return False
        before, counted = self.done, name == DENSE or name.endswith(".bin")
        if sha256_of(path, RepackError, self._step if counted else None) != entry.sha256:
            self.done = before
            return False
        self.files[name] = entry
        return True

    def _write_dense(self, file: DurableFile) -> None:
        """All tensors but the experts, as one safetensors file."""
        header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        at = 0
        for info in self.plan.dense:
            offsets = [at, at + info.nbytes]
            header[info.name] = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": offsets,
            }
            at += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for info in self.plan.dense:
            self._copy_tensor(info, file)

    def _copy_tensor(self, info: TensorInfo, file: DurableFile) -> None:
        for start in range(0, info.nbytes, PIECE_BYTES):
            piece = bytearray(min(PIECE_BYTES, info.nbytes - start))
            self.checkpoint.pread_into(info, start, memoryview(piece))
            file.write(memoryview(piece))
            self._step(len(piece))

    def _write_layer(self, layer: LayerFile, file: DurableFile) -> None:
        record = np.zeros(layer.stride, np.uint8)  # what pads it stays zero
        infos = self.store.infos(layer.layer)
        for expert in np.argsort(layer.places).tolist():
            for info, one in zip(infos, layer.slices, strict=True):
                part = record[one.offset : one.offset + one.nbytes]
                self.checkpoint.pread_into(info, expert * one.nbytes, part.data)
            file.write(record.data)
            self._step(layer.stride)

    def _step(self, count: int) -> None:
        self.done += count
        if self.on_progress is not None:
            self.on_progress(min(self.done, self.plan.nbytes), self.plan.nbytes)

    def _check_source(self) -> None:
        if identity(self.checkpoint) != self.plan.source:
            raise ExpertReadError(
                f"{self.checkpoint.folder}: changed while it was repacked; {self.out} is not "
                "finished: remove it and run again"
            )


def _copy(path: Path, file: DurableFile) -> None:
    try:
        file.write(path.read_bytes())
    except OSError as error:
        raise RepackError(f"{path}: reading failed: {error.strerror}") from error


def _plain(document: dict[str, Any]) -> Any:
    """A document as it comes back from its file."""
    return json.loads(encode(document))


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The folder for this process alone."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RepackError(f"{out}: another process repacks into it") from error
        yield
    finally:
        os.close(descriptor)
