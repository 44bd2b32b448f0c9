"""RunFile: what `generate --json` and `bench --json` wrote, read back for reports.

Refuses files that are not JSON, that something else wrote, of another schema, and fields that are
missing or of another kind: the error names the file and the place. A partial file is whole JSON of
fewer runs and says that it is partial.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from specdec import rounds_record
from specdec.errors import RunFileError
from specdec.metrics import PHASES, Metrics
from specdec.record import SCHEMA
from specdec.round import Round
from specdec.vocabulary import Vocabulary

KINDS = ("generate", "bench")

GENERATED = "prompt"
"""The class of what `specdec generate` was asked."""


@dataclass(frozen=True)
class RecordedRun:
    """One run of a file.

    name: "autoregressive" or "speculative". prompt: what tells its prompt and settings of choice
    from others', in any file. title: the prompt's id or text. kind: the prompt's class.
    """

    name: str
    prompt: str
    title: str
    kind: str
    temperature: float
    context: int | None
    budget: int | str
    repeat: int
    metrics: Metrics
    tokens: tuple[int, ...]
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class Plan:
    """What of a memory plan makes runs comparable: its bytes, layers pinned, slots of others."""

    total: int
    pinned: tuple[int, ...]
    slots: int


@dataclass(frozen=True)
class RunFile:
    """A file of runs. text: the prompt of kind "generate", None otherwise. document: all that
    stands in it."""

    path: Path
    kind: str
    partial: bool
    version: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    plan: Plan
    text: str | None
    vocabulary: Vocabulary
    runs: tuple[RecordedRun, ...]
    document: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem


def read(path: Path) -> RunFile:
    """A file of runs; RunFileError as the module says."""
    from cattrs import BaseValidationError, structure, transform_error

    document = _document(path)
    try:
        for name in ("settings", "environment", "vocabulary"):
            if not isinstance(document[name], dict):
                raise ValueError(f"{name} is {document[name]!r:.40}, expected an object")
        runs = tuple(_generated(document) if document["kind"] == KINDS[0] else _swept(document))
        return RunFile(
            path=path,
            kind=document["kind"],
            partial=bool(document["partial"]),
            version=str(document["specdec"]),
            settings=document["settings"],
            environment=document["environment"],
            plan=structure(document["plan"], Plan),
            text=document.get("prompt"),
            vocabulary={key: _token(value) for key, value in document["vocabulary"].items()},
            runs=runs,
            document=document,
        )
    except BaseValidationError as error:
        words = "; ".join(transform_error(error, path="")[:3]).replace(" @ .", " @ ")
        raise RunFileError(f"{path}: not readable: {words}") from error
    except KeyError as error:
        raise RunFileError(f"{path}: not readable: the field {error} is missing") from error
    except (AttributeError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise RunFileError(f"{path}: not readable: {error}") from error


def _document(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except OSError as error:
        raise RunFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise RunFileError(f"{path}: not JSON of a run: nested too deeply") from error
    except ValueError as error:
        raise RunFileError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict) or value.get("kind") not in KINDS:
        kind = value.get("kind") if isinstance(value, dict) else None
        found = f"kind {kind!r}" if isinstance(kind, str) else "no run of specdec"
        raise RunFileError(
            f"{path}: {found}, expected what `specdec generate --json` or `specdec bench --json` "
            "wrote"
        )
    schema = value.get("schema")
    if schema != SCHEMA:
        older = isinstance(schema, int) and schema < SCHEMA
        what = (
            f"an older specdec ({value.get('specdec')}) wrote it: make the run again"
            if older
            else "a newer specdec wrote it: update this one"
        )
        raise RunFileError(f"{path}: schema {schema!r}, expected {SCHEMA}; {what}")
    return value


def _token(value: Any) -> str | list[int]:
    """A text or bytes. ValueError for anything else, half characters too."""
    if isinstance(value, str):
        value.encode()
        return value
    return list(bytes([*value]))


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(number: str) -> float:
    """ValueError for a number beyond all floats, which would be read as infinity."""
    value = float(number)
    return value if math.isfinite(value) else _no_number(number)


def _generated(document: Mapping[str, Any]) -> Iterator[RecordedRun]:
    settings = document["settings"]
    text = str(document["prompt"])
    temperature = _temperature(settings)
    for name, run in document["runs"].items():
        yield RecordedRun(
            name=name,
            prompt=_key(text, temperature, settings),
            title=text,
            kind=GENERATED,
            temperature=temperature,
            context=None,
            budget=1 if name == "autoregressive" else _budget(settings["budget"]),
            repeat=0,
            metrics=_metrics(run),
            tokens=tuple(run["tokens"]),
            rounds=rounds_record.from_json(run["rounds"]),
        )


def _swept(document: Mapping[str, Any]) -> Iterator[RecordedRun]:
    settings = document["settings"]
    prompts = {(one["id"], one["context"]): one for one in document["prompts"]}
    first: dict[str, RecordedRun] = {}
    for run in document["runs"]:
        setting = rounds_record.setting(run)
        whole = first.get(setting)
        about = prompts[run["prompt"], run["context"]]
        tokens = run.get("tokens", whole.tokens if whole else None)
        if tokens is None:
            raise ValueError(f"run of {run['prompt']}: no tokens, and no earlier run has them")
        one = RecordedRun(
            name="autoregressive" if run["budget"] == 1 else "speculative",
            prompt=_key(about["sha256"], run["temperature"], settings),
            title=run["prompt"],
            kind=str(about["class"]),
            temperature=float(run["temperature"]),
            context=run["context"],
            budget=_budget(run["budget"]),
            repeat=int(run["repeat"]),
            metrics=_metrics(run),
            tokens=tuple(tokens),
            rounds=rounds_record.from_json(run["rounds"], whole.rounds if whole else ()),
        )
        first.setdefault(setting, one)
        yield one


def _metrics(run: Mapping[str, Any]) -> Metrics:
    import cattrs

    found = cattrs.structure(run["metrics"], Metrics)
    if found.rounds != len(run["rounds"]):
        raise ValueError(f"metrics count {found.rounds} rounds, there are {len(run['rounds'])}")
    if strange := {phase.name for phase in found.phases} - {*PHASES, "other"}:
        raise ValueError(f"metrics name the phases {sorted(strange)}, which no round has")
    return found


def _budget(value: Any) -> int | str:
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"budget is {value!r:.40}, expected a positive number or 'auto'")
    return value


def _temperature(settings: Mapping[str, Any]) -> float:
    return float(settings.get("temp") or 0.0)


def _key(prompt: str, temperature: float, settings: Mapping[str, Any]) -> str:
    """What two runs must share to be runs of the same work: compared as text, never shown."""
    names = ["model", "max_tokens", "ignore_eos", "stop", "repetition_penalty"]
    names += ["top_p", "top_k", "min_p", "seed"] if temperature else []
    return json.dumps([prompt, temperature, *(settings.get(name) for name in names)])
