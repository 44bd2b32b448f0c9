"""Rounds as `--json` writes them, and back: every tree whole, one line a round.

Of the runs of one prompt at one setting the first is written with its tokens and trees. A repeat
that drafted, accepted and emitted the same, as exactness makes most of them, is written without:
what differs are its times. Reading puts them back.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np

from specdec.round import PhaseSeconds, Round
from specdec.tree.draft_tree import DraftTree

TREE = ("tokens", "parents", "log_weights", "path", "bonus")
"""The fields of a round that a repeat leaves out."""

MEASURED = ("repeat", "metrics", "tokens", "rounds")
"""The fields of a run of a sweep that are not its setting."""


def to_json(rounds: Sequence[Round]) -> list[dict[str, Any]]:
    """Log weights keep four decimals (-inf is null), seconds seven."""
    return [
        {
            "budget": one.budget,
            "context": one.context,
            "tokens": one.tree.tokens.tolist(),
            "parents": one.tree.parents.tolist(),
            "log_weights": [
                round(weight, 4) if math.isfinite(weight) else None
                for weight in one.tree.log_weights.tolist()
            ],
            "path": list(one.path),
            "bonus": one.bonus,
            "experts": one.experts,
            "misses": one.misses,
            "stall": round(one.stall, 7),
            "seconds": {name: round(value, 7) for name, value in asdict(one.seconds).items()},
        }
        for one in rounds
    ]


def lean(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of a sweep, without tokens and trees that are those of a setting's first run."""
    first: dict[str, dict[str, Any]] = {}
    return [_lean(run, first.setdefault(setting(run), run)) for run in runs]


def setting(run: dict[str, Any]) -> str:
    """What makes two runs of a sweep repeats of each other: all but what was measured."""
    return json.dumps({name: run[name] for name in sorted(run) if name not in MEASURED})


def _lean(run: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    rounds, others = run["rounds"], first["rounds"]
    same = run["tokens"] == first["tokens"] and len(rounds) == len(others)
    if (
        run is first
        or not same
        or any(
            one[name] != other[name]
            for one, other in zip(rounds, others, strict=True)
            for name in TREE
        )
    ):
        return run
    short = [{name: one[name] for name in one if name not in TREE} for one in rounds]
    return {name: run[name] for name in run if name != "tokens"} | {"rounds": short}


def from_json(rounds: Sequence[dict[str, Any]], first: Sequence[Round] = ()) -> tuple[Round, ...]:
    """What `to_json` wrote; `first`: the rounds whose trees a repeat left out.

    ValueError, KeyError or TypeError where the fields make no rounds.
    """
    done = []
    for at, one in enumerate(rounds):
        if "tokens" in one:
            tree, path, bonus = _tree(one), tuple(one["path"]), int(one["bonus"])
            if not _is_path(tree, path):
                raise ValueError(f"round {at}: its path {list(path)} does not go down its tree")
        elif len(first) == len(rounds):
            tree, path, bonus = first[at].tree, first[at].path, first[at].bonus
        else:
            raise ValueError(f"round {at} has no tree, and no earlier run of its setting has one")
        seconds = PhaseSeconds(**{name: float(one["seconds"][name]) for name in _PHASES})
        counts: dict[str, Any] = {name: int(one[name]) for name in _COUNTS}
        done.append(Round(tree, path, bonus, seconds, **counts, stall=float(one["stall"])))
    return tuple(done)


_PHASES = tuple(PhaseSeconds.__dataclass_fields__)
_COUNTS = ("budget", "context", "experts", "misses")


def _tree(one: dict[str, Any]) -> DraftTree:
    tokens, parents, weights = one["tokens"], one["parents"], one["log_weights"]
    rows = len(tokens)
    if not (
        rows == len(parents) == len(weights) >= 1
        and parents[0] == -1
        and all(type(at) is int and 0 <= at < row for row, at in enumerate(parents) if row)
        and all(weight is None or weight <= 0 for weight in weights)
    ):
        raise ValueError("tokens, parents and log_weights make no tree")
    return DraftTree(
        np.array(tokens, np.int32),
        np.array(parents, np.int32),
        np.array([-math.inf if weight is None else weight for weight in weights], np.float64),
    )


def _is_path(tree: DraftTree, path: tuple[int, ...]) -> bool:
    """Whether `path` begins at the root and goes from parents to children."""
    return (
        path[:1] == (0,)
        and all(0 < row < tree.rows for row in path[1:])
        and all(tree.parents[row] == above for above, row in pairwise(path))
    )
