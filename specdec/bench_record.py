"""The JSON of a sweep: written anew as each run ends, so that nothing loses more than one run."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specdec import rounds_record
from specdec.bench import Run, Sweep
from specdec.bench_grid import Grid
from specdec.peer import NAME, PeerRun
from specdec.peer_match import matches
from specdec.record import JsonFile
from specdec.token_hash import token_sha256
from specdec.tokenizer import Tokenizer
from specdec.vocabulary import vocabulary


class SweepFile:
    """The file of a sweep. Text of a run is made once, however often the file is written."""

    def __init__(
        self, file: JsonFile, tokenizer: Tokenizer, head: Callable[[], dict[str, Any]]
    ) -> None:
        """head: makes the fields that say who ran what, and where."""
        self._file, self._tokenizer, self._head = file, tokenizer, head
        self._lines: list[str] = []
        self._first: dict[str, dict[str, Any]] = {}  # per setting the run written in full
        self._vocabulary: dict[str, Any] = {}

    def write(self, done: Sweep) -> None:
        """Put the sweep so far in place of the file; runs of earlier calls come first in it."""
        if not self._file.wanted:
            return
        for run in done.runs[len(self._lines) :]:
            value = run_json(run)
            first = self._first.setdefault(rounds_record.setting(value), value)
            lean = rounds_record.lean([first, value])[-1] if first is not value else value
            self._lines.append(json.dumps(lean, ensure_ascii=False, allow_nan=False))
            self._vocabulary |= vocabulary(self._tokenizer, [run])
        words = {key: self._vocabulary[key] for key in sorted(self._vocabulary, key=int)}
        document = self._head() | sweep_json(done) | {"vocabulary": words}
        self._file.write(document, {"runs": self._lines})


def sweep_json(done: Sweep) -> dict[str, Any]:
    """A sweep without its runs: what was to run, aggregates, and what agreed."""
    grid = done.grid
    return {
        "partial": done.partial,
        "kept": done.kept,
        "budgets": list(grid.budgets),
        "temperatures": list(grid.temperatures),
        "contexts": list(grid.contexts),
        "repeats": grid.repeats,
        "groups": [
            {
                "class": group.kind,
                "temperature": group.temperature,
                "context": group.context,
                "budget": budget,
                **asdict(done.aggregate(group, budget)),
            }
            for group in grid.groups
            for budget in grid.budgets
        ],
        "tokens_equal": not done.disagreements(),
        "disagreements": [task._asdict() for task in done.disagreements()],
        "peer": _peer_json(done, done.peer) if done.peer is not None else None,
    }


def run_json(run: Run) -> dict[str, Any]:
    """A run in full. All but `rounds_record.MEASURED` is its setting."""
    return {
        **run.cell.task._asdict(),
        "budget": run.cell.budget,
        "repeat": run.repeat,
        "metrics": asdict(run.metrics),
        "tokens": list(run.tokens),
        "rounds": rounds_record.to_json(run.rounds),
    }


def prompts_json(
    grid: Grid, encoded: Mapping[tuple[str, int | None], Sequence[int]]
) -> list[dict[str, Any]]:
    """Every prompt at every context; encoded: (id, context) -> its tokens."""
    return [
        {
            "id": prompt.id,
            "class": prompt.kind,
            "context": context,
            "tokens": len(encoded[prompt.id, context]),
            "sha256": token_sha256(encoded[prompt.id, context]),
        }
        for prompt in grid.prompts
        for context in grid.contexts
    ]


def fingerprint(folder: Path) -> str:
    """Tells a checkpoint from another, and from what it was before it was written again: SHA-256
    of its config and of the names, sizes and times of its files."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        about = path.stat()
        digest.update(f"{path.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def peer_run_json(run: PeerRun) -> dict[str, Any]:
    """A run of the peer."""
    value = asdict(run)
    return {**value.pop("task")._asdict(), **value}


def _peer_json(done: Sweep, runs: Sequence[PeerRun]) -> dict[str, Any]:
    return {
        "name": NAME,
        "groups": [
            {
                "class": one.group.kind,
                "context": one.group.context,
                "decode_tokens_per_second": asdict(one.speed),
                "seconds_to_first_token": asdict(one.first),
                "equal": one.equal,
                "prompts": one.prompts,
            }
            for one in matches(done)
        ],
        "runs": [peer_run_json(one) for one in runs],
    }
