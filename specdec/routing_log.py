"""RoutingLog: which experts every row of every pass chose, and which rows were committed.

The file: the line "specdec-routing 1", a JSON header on the next line, then one record per row, all
of one size (see `record`), little-endian. It appears when the run has ended, also by an error.

Refuses files of another kind, records cut off in the middle, and experts that the header rules out.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from specdec.errors import RoutingLogError

MAGIC = b"specdec-routing 1\n"
COMMITTED, PROMPT = 1, 2  # bits of a record's flags
MAX_HEADER_BYTES = 1 << 20


@dataclass(frozen=True)
class RoutingHeader:
    """What a log is about.

    layers: the MoE layers, in the order of the records' experts. experts: of each layer.
    disk_bytes, resident_bytes: per layer, of one expert, as read and as it takes a slot.
    fixed_bytes: what the run's memory plan held beside experts. kinds: per layer, which layers
    share slots (equal numbers). pinned, slots, policy, protect, rows, tolerance: settings of the
    run that was logged.
    """

    model: str
    layers: tuple[int, ...]
    experts: int
    top_k: int
    disk_bytes: tuple[int, ...]
    resident_bytes: tuple[int, ...]
    kinds: tuple[int, ...]
    fixed_bytes: int
    pinned: tuple[int, ...]
    slots: int
    policy: str
    protect: tuple[int, ...]
    rows: int
    tolerance: float

    @property
    def record(self) -> np.dtype:
        """One row of a pass: pass and run count from 0, position in the text, token, flags, and
        per layer the experts by falling logit."""
        width = "<u2" if self.experts > 256 else "u1"
        return np.dtype(
            [
                ("pass", "<i4"),
                ("run", "<i4"),
                ("position", "<i4"),
                ("token", "<i4"),
                ("flags", "u1"),
                ("experts", width, (len(self.layers), self.top_k)),
            ]
        )

    def check(self, where: Path, layers: Sequence[int], experts: int) -> None:
        """RoutingLogError unless the log is of a model with these MoE layers and experts."""
        if self.layers != tuple(layers) or self.experts != experts:
            raise RoutingLogError(
                f"{where}: is of {self.model}, {len(self.layers)} layers of {self.experts} "
                f"experts; this model has {len(layers)} of {experts}"
            )

    def encode(self) -> bytes:
        return MAGIC + json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def decode(cls, raw: Mapping[str, Any], where: Path) -> Self:
        """RoutingLogError where a field is missing or of another kind."""
        lists = ("layers", "disk_bytes", "resident_bytes", "kinds", "pinned", "protect")
        counts = ("experts", "top_k", "fixed_bytes", "slots", "rows")
        try:
            values: dict[str, Any] = {name: tuple(map(_count, raw[name])) for name in lists}
            values |= {name: _count(raw[name]) for name in counts}
            values["policy"], values["tolerance"] = str(raw["policy"]), float(raw["tolerance"])
            header = cls(model=str(raw["model"]), **values)
        except (KeyError, TypeError, ValueError) as error:
            raise RoutingLogError(f"{where}: broken header: {error!r}") from error
        each = {len(header.disk_bytes), len(header.resident_bytes), len(header.kinds)}
        sizes = 1 <= header.top_k <= header.experts <= 65536
        if each != {len(header.layers)} or len(header.protect) != 2 or not sizes or not header.rows:
            raise RoutingLogError(f"{where}: broken header: its fields contradict each other")
        return header


@dataclass(frozen=True, eq=False)
class RoutingLog:
    """A log in memory; `rows` has the header's record type, in the order in which rows ran."""

    header: RoutingHeader
    rows: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Self:
        """RoutingLogError as the module says."""
        try:
            with path.open("rb") as file:
                if file.read(len(MAGIC)) != MAGIC:
                    raise RoutingLogError(
                        f"{path}: not a routing log, which begins with {MAGIC.decode()[:-1]!r}"
                    )
                line = file.readline(MAX_HEADER_BYTES)
                raw = json.loads(line)
                if not isinstance(raw, dict):
                    raise RoutingLogError(f"{path}: broken header: expected an object")
                header = RoutingHeader.decode(raw, path)
                data = file.read()
        except OSError as error:
            raise RoutingLogError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise RoutingLogError(f"{path}: broken header: {error}") from error
        whole, rest = divmod(len(data), header.record.itemsize)
        if rest:
            raise RoutingLogError(
                f"{path}: truncated: {rest} bytes after {whole} whole records of "
                f"{header.record.itemsize}"
            )
        log = cls(header, np.frombuffer(data, header.record))
        log._check(path)
        return log

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [passes + 1]: first row of each pass, then the number of rows."""
        first = np.flatnonzero(np.diff(self.rows["pass"], prepend=-1))
        return np.append(first, len(self.rows))

    @property
    def passes(self) -> int:
        return len(self.starts) - 1

    @property
    def committed(self) -> np.ndarray:
        """bool [rows]."""
        return (self.rows["flags"] & COMMITTED) > 0

    @property
    def tokens(self) -> int:
        """Tokens that were generated: the first of each run, and its committed rows after."""
        prompt = (self.rows["flags"] & PROMPT) > 0
        runs = len(np.unique(self.rows["run"]))
        return runs + int((self.committed & ~prompt).sum())

    def part(self, first: int, last: int) -> "RoutingLog":
        """The passes from `first` up to `last`."""
        return RoutingLog(self.header, self.rows[self.starts[first] : self.starts[last]])

    def requests(self, rows: np.ndarray | None = None) -> np.ndarray:
        """int64 [n, 3], each distinct (pass, layer's index, expert) once, ascending.

        rows: bool [rows], those that count; None for all.
        """
        header, every = self.header, self.rows if rows is None else self.rows[rows]
        at = every["pass"].astype(np.int64)[:, None] * len(header.layers)
        at = (at + np.arange(len(header.layers)))[:, :, None] * header.experts + every["experts"]
        flat = np.unique(at)
        flat, expert = np.divmod(flat, header.experts)
        return np.stack([*np.divmod(flat, len(header.layers)), expert], axis=1)

    def uses(self) -> np.ndarray:
        """int64 [layers, experts]: committed rows that used each expert."""
        header, chosen = self.header, self.rows["experts"][self.committed]
        at = np.arange(len(header.layers))[:, None] * header.experts + chosen
        counts = np.bincount(at.ravel(), minlength=len(header.layers) * header.experts)
        return counts.reshape(len(header.layers), header.experts)

    def _check(self, path: Path) -> None:
        if not len(self.rows):
            raise RoutingLogError(f"{path}: holds no pass")
        experts = self.header.experts
        if self.rows["experts"].size and int(self.rows["experts"].max()) >= experts:
            raise RoutingLogError(
                f"{path}: names expert {int(self.rows['experts'].max())} of {experts}"
            )
        if (np.diff(self.rows["pass"]) < 0).any():
            raise RoutingLogError(f"{path}: its passes are not in order")


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} where a count belongs")
    return value
