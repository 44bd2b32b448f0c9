"""The commands as tests run them: in this process, or in one of their own."""

import json
import subprocess
import sys

from click.testing import CliRunner

from specdec.cli import main

PROMPT = ["-p", "the rain in spain", "--raw"]


def run(*arguments, **options):
    """The command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **options)


def recorded(tmp_path, *arguments):
    """The command with --json: (result, document)."""
    path = tmp_path / "run.json"
    done = run(*arguments, "--json", path)
    assert done.exit_code == 0, done.stderr
    return done, json.loads(path.read_text())


def process(*arguments, **options):
    """The command in a process of its own, as it is run from a shell."""
    return subprocess.Popen(
        [sys.executable, "-m", "specdec", *map(str, arguments)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},
    )


def generate(pair, *arguments):
    """Two tokens of text."""
    return run("generate", *pair.options, *PROMPT, "--max-tokens", "2", *arguments)


def fails(done, *words):
    """One line of error, exit code 2, no traceback, no text."""
    assert done.exit_code == 2, (done.exit_code, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert done.stdout == ""
    return True
