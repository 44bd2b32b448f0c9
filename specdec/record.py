"""The JSON that `--json` writes: docs/json.md describes it. Nothing is half written.

Refuses a path that cannot be written before any work is done, and replaces an existing file only
by a complete one.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from specdec import __version__, rounds_record
from specdec.errors import SpecdecError
from specdec.machine import machine

if TYPE_CHECKING:
    from specdec.generation import Result
    from specdec.hot_set import Warmed
    from specdec.kernels.array import Backend
    from specdec.metrics import Comparison, Memory, Metrics
    from specdec.plan import MemoryPlan

SCHEMA = 2
"""Raised when a field changes its meaning or goes; new fields do not raise it."""

LINE, WHOLE = 100, ("one of rounds", "vocabulary")
"""Characters of a value that is written on one line; values that are, however long."""


class JsonFile:
    """A JSON file to be: proves on entry that it can be written, appears whole or not at all.

    Use as a context manager and call `write`; leaving without it leaves an older file of that name
    as it was. A path of None writes nothing.
    """

    def __init__(self, path: str | None) -> None:
        # A link stays one: what it leads to is written.
        self._path = Path(path).resolve() if path is not None else None

    def __enter__(self) -> Self:
        if self._path is None:
            return self
        self._draft = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
        # Of os.path: what may not be looked at counts as absent, and cannot be written either.
        there = os.path.exists(self._path)
        if there and not self._path.is_file():
            raise SpecdecError(f"--json {self._path}: exists and is not a file")
        if there and not os.access(self._path, os.W_OK):
            raise SpecdecError(f"--json {self._path}: exists and may not be written")
        try:
            self._draft.touch()
        except OSError as error:
            raise SpecdecError(
                f"--json {self._path}: cannot be written: {error.strerror}"
            ) from error
        return self

    @property
    def wanted(self) -> bool:
        """Whether there is a file to write."""
        return self._path is not None

    def write(
        self, document: dict[str, Any], written: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        """Put `document` in place, and behind its fields lists whose parts are JSON already.

        May be called again: a file is always whole, and the last one stays.
        """
        if self._path is None:
            return
        try:
            text = lines(document)
            for name, parts in (written or {}).items():
                inner = ",\n    ".join(parts)
                field = f'"{name}": [\n    {inner}\n  ]' if parts else f'"{name}": []'
                text = f"{text[:-1].rstrip()},\n  {field}\n}}"
            text += "\n"
            # A file name need not be text. Its stray bytes are lone surrogates here, and the
            # escape of one in Python is that of JSON.
            self._draft.write_bytes(text.encode(errors="backslashreplace"))
            os.replace(self._draft, self._path)
        except OSError as error:
            raise SpecdecError(
                f"--json {self._path}: cannot be written: {error.strerror}"
            ) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._path is not None:
            self._draft.unlink(missing_ok=True)


def lines(value: Any, indent: str = "", key: str = "") -> str:
    """JSON for people and machines: short values, lists of numbers and rounds on one line each."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    inner = indent + "  "
    if len(text) <= LINE or key in WHOLE:
        return text
    if isinstance(value, dict):
        fields = [
            f"{inner}{json.dumps(name, ensure_ascii=False)}: {lines(part, inner, name)}"
            for name, part in value.items()
        ]
        return "{\n" + ",\n".join(fields) + "\n" + indent + "}"
    if isinstance(value, list | tuple) and any(isinstance(one, dict | list) for one in value):
        parts = (inner + lines(part, inner, f"one of {key}") for part in value)
        return "[\n" + ",\n".join(parts) + "\n" + indent + "]"
    return text


def head(
    kind: str,
    settings: dict[str, Any],
    backend: "Backend",
    plan: "MemoryPlan",
    memory: "Memory",
    warmed: "Warmed | None" = None,
) -> dict:
    """What every document begins with: who wrote it, where, how it was asked, what was planned."""
    import mlx.core as mx

    from specdec.kernels.executor import threads

    return {
        "schema": SCHEMA,
        "kind": kind,
        "specdec": __version__,
        "environment": {
            "python": platform.python_version(),
            "mlx": metadata.version("mlx"),
            "numpy": metadata.version("numpy"),
            "device": str(mx.default_device()),
            "kernels": backend.name,
            "threads": threads() if backend.name == "cpu" else None,
            "exact": backend.exact and not settings.get("cache_tolerance"),
            **machine(),
        },
        "settings": settings,
        "plan": {
            "parts": [part._asdict() for part in plan.parts],
            "total": plan.total,
            "cap": plan.cap,
            "cap_note": plan.cap_note,
            "pinned": list(plan.pinned),
            "slots": plan.slots,
        },
        "memory": asdict(memory),
        "warm": None if warmed is None else asdict(warmed),
    }


def run(result: "Result", metrics: "Metrics") -> dict[str, Any]:
    """One run: its figures, its tokens and text, and every round."""
    return {
        "metrics": asdict(metrics),
        "text": result.text,
        "tokens": list(result.tokens),
        "rounds": rounds_record.to_json(result.rounds),
    }


def comparison(done: "Comparison") -> dict[str, Any]:
    """The verdict on two runs."""
    return {
        "order": ["autoregressive", "speculative"],
        "speedup": done.speedup,
        "speedup_low": done.speedup_low,
        "speedup_high": done.speedup_high,
        "tokens_equal": done.equal,
        "first_difference": done.first_difference,
    }
