"""Resuming a sweep: the runs of an earlier process, where they may stand beside new ones.

They may if everything they depend on is the same: versions, machine, model files, settings,
prompts, and what the memory plan kept in memory. Refuses anything else in words.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specdec import run_file
from specdec.bench import Run
from specdec.bench_grid import Cell, Grid, Task
from specdec.errors import ResumeError
from specdec.peer import PeerRun
from specdec.run_file import RunFile

NOT_CONDITIONS = ("json_path", "resume", "quiet")
"""Options that do not change what a run does."""

SHOWN = 60
"""Characters of a value that differs."""


def read(path: Path) -> RunFile | None:
    """The file of an earlier sweep; None where there is none. Errors as of `run_file.read`."""
    if not path.exists():
        return None
    earlier = run_file.read(path)
    if earlier.kind != "bench":
        raise ResumeError(f"--resume: {path} is of kind {earlier.kind!r}, expected 'bench'")
    return earlier


def kept(earlier: RunFile, head: dict[str, Any], grid: Grid) -> tuple[list[Run], list[PeerRun]]:
    """The runs of `earlier`, if `head`, what this process would write, has the same conditions.

    ResumeError names every condition that differs, or the run that is none of the grid.
    """
    was, now = _conditions(earlier.document), _conditions(json.loads(json.dumps(head)))
    differing = [
        f"{name} {_short(was.get(name))}, here {_short(now.get(name))}"
        for name in {**now, **was}
        if was.get(name) != now.get(name)
    ]
    if differing:
        raise ResumeError(
            f"--resume: {earlier.path} was made with {'; '.join(differing)}: its runs cannot stand "
            "beside new ones"
        )
    cells: dict[tuple[Task, int | str], Cell] = {(c.task, c.budget): c for c in grid.cells}
    found: dict[tuple[Any, int], Run] = {}
    for one in earlier.runs:
        task = Task(one.title, one.temperature, one.context)
        cell = cells.get((task, one.budget))
        if cell is None or one.repeat >= grid.repeats or (cell, one.repeat) in found:
            raise ResumeError(
                f"--resume: {earlier.path}: its run of {one.title} at budget {one.budget}, repeat "
                f"{one.repeat}, is none of this sweep, or stands there twice"
            )
        found[cell, one.repeat] = Run(cell, one.repeat, one.metrics, one.tokens, one.rounds)
    return list(found.values()), _peer(earlier)


def _peer(earlier: RunFile) -> list[PeerRun]:
    import cattrs

    peer = earlier.document.get("peer")
    try:
        return [
            cattrs.structure({**one, "task": [one[name] for name in Task._fields]}, PeerRun)
            for one in (peer["runs"] if peer else [])
        ]
    except (KeyError, TypeError, cattrs.BaseValidationError) as error:
        raise ResumeError(f"--resume: {earlier.path}: peer: not readable: {error!r}") from error


def _conditions(document: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a run's figures and tokens depend on, by a name for each."""
    settings, plan = document["settings"], document["plan"]
    models = document.get("models") or {}
    return {
        "specdec": document["specdec"],
        **document["environment"],
        **{name: settings[name] for name in settings if name not in NOT_CONDITIONS},
        **{f"{name} experts": plan[name] for name in ("pinned", "slots")},
        **{f"files of the {name}": models[name] for name in models},
        "mlx-lm": document.get("peer_version"),
        # Not "prompts", which is the file that was named.
        "tokens of prompts": document.get("prompts"),
    }


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
