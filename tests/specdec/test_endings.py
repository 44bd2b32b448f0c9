"""Runs that end before their time, at the command line: what was done until then is told."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import count

import pytest

import specdec.generation
from specdec import checkpoint
from specdec.errors import ExpertReadError, SpecdecError
from specdec.generation import Request
from specdec.generation import generate as run_generation
from specdec.load import Settings, load
from specdec.writer import Piece
from tests.commands import PROMPT, generate, process, run
from tests.pairs import write_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("compare", [[], ["--compare"]])
def test_interrupt_prints_the_summary_and_exits_130(pair, tmp_path, compare):
    path = tmp_path / "run.json"
    arguments = [*pair.options, *PROMPT, "--max-tokens", "4000", "--ignore-eos", "--json", path]
    with process("generate", *arguments, *compare) as running:
        if compare:  # the plain run comes first, and prints no text
            while b"order:" not in running.stderr.readline():
                pass
        else:
            running.stdout.read(8)
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert b"Traceback" not in stderr
    assert b"interrupted" in stderr
    if not compare:
        assert b"ended by: interrupted" in stderr
        metrics = json.loads(path.read_text())["runs"]["speculative"]["metrics"]
        assert metrics["finish"] == "interrupted"
        assert 0 < metrics["generated_tokens"] < 4000


def test_a_closed_pipe_ends_with_the_summary(pair):
    """`specdec generate | head -c 4`."""
    arguments = [*pair.options, *PROMPT, "--max-tokens", "4000", "--ignore-eos"]
    with process("generate", *arguments) as running:
        running.stdout.read(4)
        running.stdout.close()
        stderr = running.stderr.read().decode()
        running.wait(timeout=60)
    assert running.returncode == 141
    assert "Traceback" not in stderr
    assert "error: " not in stderr
    count = re.search(r"^generated +(\d+) tokens.* ended by: error$", stderr, re.MULTILINE)
    assert count is not None, stderr
    assert int(count[1]) < 4000


@pytest.mark.parametrize("command", ["inspect", "bench", "doctor"])
def test_a_closed_pipe_ends_the_other_commands_quietly(pair, tmp_path, command):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "class": "b", "prompt": "the sea"}')
    arguments = {
        "inspect": [pair.target],
        "bench": [*pair.options, "--prompts", prompts, "--budgets", "1", "-q"],
        "doctor": [pair.target, pair.draft, "--positions", "3", "-q"],
    }
    reader, writer = os.pipe()
    os.close(reader)
    with process(command, *arguments[command], stdout=writer) as running:
        os.close(writer)
        assert running.stderr.read() == b""
        running.wait(timeout=60)
    assert running.returncode == 141


def shell(redirection, *arguments):
    """A command with a redirection that subprocess has no word for."""
    line = [sys.executable, "-m", "specdec", *map(str, arguments)]
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *line],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_full_disk_ends_with_the_summary(pair):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    done = shell(">/dev/full", "generate", *pair.options, *PROMPT, "--max-tokens", "50")
    assert done.returncode == 2
    assert "ended by: error" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: standard output cannot be written: No ")


@pytest.mark.parametrize("command", ["generate", "inspect"])
def test_a_closed_stdout_is_refused(pair, command):
    arguments = {"generate": [*pair.options, *PROMPT], "inspect": [pair.target]}[command]
    done = shell(">&-", command, *arguments)
    assert done.returncode == 2
    assert done.stderr == "error: standard output is closed, and the results go there\n"


def test_without_a_stderr_the_text_comes_all_the_same(pair):
    arguments = ["generate", *pair.options, *PROMPT, "--max-tokens", "8"]
    expected = run(*arguments).stdout
    done = shell("2>&-", *arguments)
    assert (done.returncode, done.stdout) == (0, expected)
    reader, writer = os.pipe()
    os.close(reader)
    with process(*arguments, stderr=writer) as running:  # 2>&1 | head
        os.close(writer)
        assert running.stdout.read().decode() == expected
    assert running.returncode == 0


# --- Ctrl-C


EARLY = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
from specdec.entry import main
main()
"""
LATE = """
import atexit, os, signal, sys
from specdec.entry import main
atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.argv[1:] = ["--version"]
main()
"""


@pytest.mark.parametrize(("code", "status"), [(EARLY, 130), (LATE, 0)])
def test_an_interrupt_among_imports_or_at_exit_shows_no_traceback(code, status):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == status
    assert done.stderr == b""


def test_an_interrupt_in_the_warm_up_ends_like_others(pair, tmp_path, monkeypatch):
    true = specdec.generation.generate
    monkeypatch.setattr(
        specdec.generation, "generate", lambda *a: replace(true(*a), finish="interrupted")
    )
    path = tmp_path / "run.json"
    done = generate(pair, "--compare", "--json", path)
    assert done.exit_code == 130, done.stderr
    assert done.stderr.endswith("interrupted\n")
    document = json.loads(path.read_text())
    assert (document["partial"], document["runs"], document["comparison"]) == (True, {}, None)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"id": name, "class": "x", "prompt": "the sea"} for name in "abc"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_an_interrupted_bench_reports_what_was_run(pair, prompts, tmp_path):
    path = tmp_path / "bench.json"
    arguments = [*pair.options, "--prompts", prompts, "--budgets", "1,3", "--repeat", "10000"]
    with process("bench", *arguments, "--max-tokens", "4", "--json", path) as running:
        for line in running.stderr:
            if line.startswith(b"repeat 2/"):
                break
        running.send_signal(signal.SIGINT)
        stdout, stderr = (each.decode() for each in running.communicate(timeout=60))
    assert running.returncode == 130
    assert "Traceback" not in stderr
    document = json.loads(path.read_text())
    count = len(document["runs"])
    assert document["partial"] is True
    assert 6 < count < 60000
    assert stdout.startswith(f"PARTIAL: ended after {count} of 60000 runs\n")
    assert "tokens equal over the runs that were made" in stdout
    assert [one["prompts"] for one in document["groups"]] == [3, 3]


@pytest.mark.parametrize("failing", [0, 2, 3])
def test_a_bench_that_fails_reports_what_was_run(pair, prompts, tmp_path, monkeypatch, failing):
    """Runs 0 and 1 are the warm-up."""
    true, calls = specdec.generation.generate, count()

    def broken(*arguments):
        if next(calls) == failing:
            raise ExpertReadError("the disk is gone")
        return true(*arguments)

    monkeypatch.setattr(specdec.generation, "generate", broken)
    path = tmp_path / "bench.json"
    path.write_text("old")
    options = ["--prompts", prompts, "--budgets", "1,3", "--repeat", "1", "--max-tokens", "4"]
    done = run("bench", *pair.options, *options, "--json", path)
    assert done.exit_code == 2
    assert done.stdout.startswith(f"PARTIAL: ended after {max(0, failing - 2)} of 6 runs\n")
    assert done.stderr.endswith("error: the disk is gone\n")
    assert "None" not in done.stdout
    if failing == 3:  # what was run stays, for --resume
        document = json.loads(path.read_text())
        assert (document["partial"], len(document["runs"])) == (True, 1)
    else:
        assert path.read_text() == "old"


# --- errors amid a run


def failing_reads(monkeypatch, after):
    """Every read of a weight fails after so many."""
    true, calls = checkpoint.read_at, count()

    def broken(*arguments):
        if next(calls) >= after:
            raise OSError(5, "Input/output error")
        return true(*arguments)

    monkeypatch.setattr(checkpoint, "read_at", broken)


def test_an_error_brings_what_was_done_until_then(pair, monkeypatch):
    loaded = load(
        Settings(str(pair.target), str(pair.draft), pin_layers=0, cache_slots=4, context=200)
    )
    tokens = tuple(loaded.tokenizer.encode("the rain in spain"))
    request = Request(tokens, budget=4, max_tokens=40)
    whole = run_generation(loaded.engine, loaded.tokenizer, request)
    reads = loaded.engine.target.experts.reads().reads
    seen = 0
    for after in (0, reads // 2, 3 * reads // 4):
        shown: list[Piece] = []
        with monkeypatch.context() as patch:
            failing_reads(patch, after)
            with pytest.raises(ExpertReadError, match="Input/output error") as caught:
                run_generation(loaded.engine, loaded.tokenizer, request, shown.append)
        part = caught.value.result
        assert part is not None
        assert part.finish == "error"
        assert part.tokens == whole.tokens[: len(part.tokens)]
        assert len(part.tokens) < len(whole.tokens)
        assert "".join(piece.text for piece in shown) == part.text
        seen = max(seen, len(part.rounds))
        again = run_generation(loaded.engine, loaded.tokenizer, request)
        assert again.tokens == whole.tokens
    assert seen > 0
    loaded.engine.target.experts.store.checkpoint.close()


def test_text_that_cannot_be_shown_ends_the_run(pair):
    loaded = load(Settings(str(pair.target), str(pair.draft), context=200))
    request = Request(tuple(loaded.tokenizer.encode("the rain")), max_tokens=100)

    def show(text):
        raise SpecdecError("no more room")

    with pytest.raises(SpecdecError, match="no more room") as caught:
        run_generation(loaded.engine, loaded.tokenizer, request, show)
    assert caught.value.result is not None
    assert 0 < len(caught.value.result.tokens) < 20
    loaded.engine.target.experts.store.checkpoint.close()


def test_a_disk_error_ends_the_run_and_keeps_the_old_json(pair, tmp_path, monkeypatch):
    """The tenth expert read after loading fails."""
    path = tmp_path / "run.json"
    path.write_text("old")
    reads, true = [0], checkpoint.read_at

    def failing(*arguments):
        reads[0] += 1
        if reads[0] > armed:
            raise OSError(5, "Input/output error")
        return true(*arguments)

    armed = 10**9
    monkeypatch.setattr(checkpoint, "read_at", failing)
    slots = ["--pin-layers", "1", "--cache-slots", "2", "--json", path]
    assert generate(pair, *slots).exit_code == 0
    path.write_text("old")
    armed, reads[0] = reads[0] - 10, 0
    done = generate(pair, *slots)
    assert done.exit_code == 2
    assert "error: " in done.stderr
    assert "Input/output error" in done.stderr
    assert "Traceback" not in done.stderr
    assert re.search(
        r"^speculative\nprompt .*\nsampling .*\ngenerated .* ended by: error$", done.stderr, re.M
    )
    assert path.read_text() == "old"


def test_a_run_that_ignores_ctrl_c_goes_on_to_its_end(pair):
    """`trap '' INT` in a script, or `&` in one."""
    arguments = [*pair.options, *PROMPT, "--max-tokens", "300", "--ignore-eos", "-q"]
    line = [sys.executable, "-m", "specdec", "generate", *map(str, arguments)]
    with subprocess.Popen(
        ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *line],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:
        assert running.stdout is not None
        running.stdout.read(8)
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate(timeout=60)
    assert (running.returncode, stderr) == (0, b"")
