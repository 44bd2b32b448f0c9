"""The command line: what it refuses, what it imports, where it prints, how it ends."""

import subprocess
import sys

import pytest
from click.testing import CliRunner

from specdec.cli import main


def run(*arguments, **options):
    """The command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **options)


def python(code, *arguments):
    """Code in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


HEAVY = {"mlx", "numpy", "scipy", "tokenizers", "jinja2", "huggingface_hub", "numba"}
HEAVY |= {"matplotlib", "cattrs"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "--help"], ["bench", "-h"], ["report", "-h"]]
)
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import sys
from specdec.cli import main
try:
    main({arguments!r})
except SystemExit as end:
    assert end.code == 0
loaded = {{name.partition(".")[0] for name in sys.modules}} & {HEAVY!r}
assert not loaded, loaded
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "0"], "0 is not in the range 1<=x<=256"),
        (["--budget", "257"], "257 is not in the range 1<=x<=256"),
        (["--tree", "bush"], "'best-first', 'chain', 'spine'"),
        (["--pin-layers", "-1"], "-1 is not in the range x>=0"),
        (["--memory-gb", "0"], "0.0 is not in the range 0<x<=1000000.0"),
        (["--memory-gb", "nan"], "nan is not a finite number"),
        (["--max-tokens", "0"], "0 is not in the range x>=1"),
        (["--prefill-chunk", "0"], "0 is not in the range x>=1"),
        (["--stop", ""], "--stop must not be empty"),
        (["--compare", "--budget", "1"], "compare plain decoding to itself"),
        (["-p", "x", "--prompt-file", "y"], "exclude each other"),
        (["--raw", "--system", "x"], "--system needs the chat template"),
        (["--model", "m", "-p", "x", "--budget", "6"], "--budget 6 needs a draft"),
        (["--model", "m", "-p", "x", "--compare"], "--compare needs a draft"),
        (["--model", "m"], "no prompt: give --prompt"),
        (["-p", ""], "the prompt is empty"),
        (["--prompt-file", "/no/such/file"], "/no/such/file"),
    ],
)
def test_contradictions_are_refused_before_any_work(arguments, words):
    done = run("generate", *arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_a_prompt_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "prompt"
    path.write_bytes(b"\xff\xfe")
    done = run("generate", "--prompt-file", path)
    assert done.exit_code == 2
    assert str(path) in done.stderr
    assert "standard input" in run("generate", "-p", "-", input=b"\xff").stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budgets", "1,x"], "'x' is not a valid integer range"),
        (["--budgets", "1,300"], "300 is not in the range"),
        (["--budgets", "2,2"], "names a budget twice"),
        (["--repeat", "0"], "0 is not in the range"),
        (["--model", "m"], "budgets above 1 need a draft"),
        (["--prompts", "/no/such/file"], "/no/such/file: cannot be read"),
    ],
)
def test_bench_refuses_too(arguments, words):
    done = run("bench", *arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())


def test_doctor_wants_both_or_none():
    done = run("doctor", "somewhere")
    assert done.exit_code == 2
    assert "a TARGET needs its DRAFT" in done.stderr
