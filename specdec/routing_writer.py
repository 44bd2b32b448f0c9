"""RoutingWriter: notes the routing of every pass while a run goes on, and writes it down late.

It is told of a pass when the pass is committed, and keeps the routing where it was computed: on a
GPU nothing is waited for. Every so often it reads back what has gathered, and appends it to the
file, which is put in place at the end. A disk that fails ends the run with a RoutingLogError.
"""

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from specdec.durable import DurableFile
from specdec.errors import RoutingLogError
from specdec.routing_log import COMMITTED, PROMPT, RoutingHeader

if TYPE_CHECKING:
    from specdec.kernels.array import Array
    from specdec.load import Loaded
    from specdec.target.passes import Pass

GATHERED_ROWS = 1024


class RoutingWriter:
    """An observer of a target, as a context manager around a command; None writes nothing.

    Entering proves that the file can be written; `begin` comes after loading.
    """

    def __init__(self, path: str | None) -> None:
        self._file = DurableFile(Path(path), RoutingLogError) if path is not None else None
        self._header: RoutingHeader | None = None
        self._gathered: list[tuple[np.ndarray, dict[int, Array]]] = []
        self._rows, self._pass, self._run = 0, 0, -1

    def __enter__(self) -> Self:
        if self._file is not None:
            self._file.__enter__()
        return self

    def begin(self, loaded: "Loaded", tolerance: float = 0.0) -> None:
        """Watch a loaded target from now on."""
        if self._file is None:
            return
        self._header = header_of(loaded, tolerance)
        self._file.write(self._header.encode())
        loaded.engine.target.observers.append(self)

    def __call__(self, tokens: np.ndarray, this: "Pass", rows: slice | list[int]) -> None:
        """A pass over `tokens` is about to be committed: all of it, or these rows."""
        assert self._header is not None
        prompt = isinstance(rows, slice)
        if prompt and this.positions[0] == 0:
            self._run += 1
        records = np.zeros(len(tokens), self._header.record)
        records["pass"], records["run"] = self._pass, self._run
        records["position"], records["token"] = this.positions, tokens
        records["flags"] = PROMPT if prompt else 0
        records["flags"][rows] |= COMMITTED
        self._pass += 1
        self._rows += len(tokens)
        self._gathered.append((records, dict(this.chosen)))
        if self._rows >= GATHERED_ROWS:
            self._write()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is None:
            return
        try:
            if self._header is not None and not isinstance(error, RoutingLogError):
                self._write()
                self._file.keep()
        finally:
            self._file.__exit__(kind, error, trace)

    def _write(self) -> None:
        from specdec.kernels.array import to_numpy

        assert self._header is not None
        assert self._file is not None
        for records, chosen in self._gathered:
            for at, layer in enumerate(self._header.layers):
                records["experts"][:, at] = to_numpy(chosen[layer])
            self._file.write(records.tobytes())
        self._gathered, self._rows = [], 0


def header_of(loaded: "Loaded", tolerance: float = 0.0) -> RoutingHeader:
    """What a log of this target begins with."""
    target, plan = loaded.engine.target, loaded.plan
    store, config = target.experts.store, target.config
    layers = store.layers
    geometries = [store.geometry(layer) for layer in layers]
    kinds = list(dict.fromkeys(geometries))
    experts = sum(
        part.bytes for part in plan.parts if part.name in ("pinned experts", "expert slots")
    )
    return RoutingHeader(
        model=store.checkpoint.folder.resolve().name,
        layers=tuple(layers),
        experts=store.num_experts,
        top_k=config.top_k,
        disk_bytes=tuple(sum(t.bytes_on_disk for t in one.tensors) for one in geometries),
        resident_bytes=tuple(one.bytes_resident(loaded.backend.dtype) for one in geometries),
        kinds=tuple(kinds.index(one) for one in geometries),
        fixed_bytes=plan.total - experts,
        pinned=plan.pinned,
        slots=plan.slots,
        policy=target.experts.streaming.policy,
        protect=target.experts.streaming.protect,
        rows=target.experts.streaming.rows,
        tolerance=tolerance,
    )
