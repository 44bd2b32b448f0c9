"""Run files that commands have really written, on the demo pair."""

import json
import string
from pathlib import Path
from typing import NamedTuple

import pytest

from specdec.engine import Engine
from tests.commands import run


class Runs(NamedTuple):
    """Files of `--json`: one generation compared, two budgets, a sweep; and interrupted ones."""

    compared: Path
    two: Path
    eight: Path
    sweep: Path
    cut: Path
    cut_sweep: Path


def write_runs(folder: Path) -> Runs:
    """Run the commands; the last two are interrupted on the way."""
    runs = Runs(*(folder / f"{name}.json" for name in Runs._fields))
    names = string.ascii_lowercase[:6]
    lines = [{"id": c, "class": "xy"[c > "c"], "prompt": f"def {c}(self):\n"} for c in names]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    generate = ("generate", "--max-tokens", "24", "--ignore-eos")
    slots = ("--pin-layers", "4", "--cache-slots", "200")
    bench: tuple[object, ...] = ("bench", "--prompts", prompts, "--budgets", "1,3,auto")
    # four rounds at least, whatever is accepted: fewer have no interval
    bench += ("--repeat", "2", "--max-tokens", "32", "--ignore-eos")
    for arguments in (
        (*generate, *slots, "--budget", "4", "--compare", "--json", runs.compared),
        (*generate, "--budget", "2", "--json", runs.two),
        (*generate, "--budget", "8", "--tree", "spine", "--json", runs.eight),
        (*bench, "--json", runs.sweep),
    ):
        done = run(*arguments)
        assert done.exit_code == 0, done.stderr
    for arguments, rounds in (
        ((*generate, "--budget", "4", "--json", runs.cut), 3),
        ((*bench, "--json", runs.cut_sweep), 160),
    ):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, rounds)
            assert run(*arguments).exit_code == 130
    return runs


def interrupt_after(patch, rounds: int) -> None:
    """Ctrl-C in the round after so many."""
    step, made = Engine.step, []

    def counted(*arguments, **options):
        made.append(1)
        if len(made) > rounds:
            raise KeyboardInterrupt
        return step(*arguments, **options)

    patch.setattr(Engine, "step", counted)
