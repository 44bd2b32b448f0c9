"""`specdec generate --show-tree`: colours on a terminal, trees of rounds, the text untouched."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import tty

import pytest

from specdec.commands.console import emit
from specdec.commands.watch import colors
from specdec.demo_pair import TARGET
from specdec.tokenizer import Tokenizer
from tests.commands import PROMPT, run
from tests.pairs import write_pair

ESCAPE = re.compile(rb"\x1b\[\d*m")
GREEN, MAGENTA = b"\x1b[32m", b"\x1b[35m"
DEMO = ["generate", "--max-tokens", "30", "--ignore-eos"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


def on_terminal(*arguments, both=False, **environment):
    """(stdout, stderr) of the command with stdout on a terminal, and stderr there too if `both`."""
    ours, theirs = pty.openpty()
    tty.setraw(theirs)  # line ends as they are
    known = {name: os.environ[name] for name in os.environ if name not in ("NO_COLOR", "TERM")}
    line = [sys.executable, "-m", "specdec", *map(str, arguments)]
    errors = theirs if both else subprocess.PIPE
    env = {**known, "TERM": "xterm", **environment}
    with subprocess.Popen(line, stdout=theirs, stderr=errors, env=env) as running:
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 1 << 16):
                shown += data
        except OSError:  # how Linux says that the other end has closed
            pass
        stderr = b"" if running.stderr is None else running.stderr.read()
    os.close(ours)
    assert running.returncode == 0, stderr
    return shown, stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A run of the demo pair on a terminal: stdout, stderr and document."""
    path = tmp_path_factory.mktemp("demo") / "run.json"
    stdout, stderr = on_terminal(*DEMO, "--show-tree", "--json", path)
    return stdout, stderr.decode(), json.loads(path.read_text())["runs"]["speculative"]


def test_a_terminal_shows_where_each_token_came_from(demo):
    stdout, stderr, document = demo
    assert ESCAPE.sub(b"", stdout).decode() == document["text"]
    tokens, accepted = document["tokens"], [False]
    for one in document["rounds"]:
        accepted += [True] * (len(one["path"]) - 1) + [False]
    bytes_of = Tokenizer.open(TARGET).token_bytes
    expected = {GREEN: b"", MAGENTA: b""}
    for token, drafted in zip(tokens, accepted, strict=False):
        expected[GREEN if drafted else MAGENTA] += bytes_of(token)
    found = {GREEN: b"", MAGENTA: b""}
    for color, text in re.findall(rb"(\x1b\[3\dm)(.*?)\x1b\[0m", stdout, re.DOTALL):
        found[color] += text
    assert found == expected
    assert expected[GREEN]
    assert "tokens: drafted and accepted, the target's own (bonus)\n" in stderr
    assert "\x1b" not in stderr


def test_no_color_is_honoured(demo):
    stdout, _ = on_terminal(*DEMO, "--show-tree", NO_COLOR="1")
    assert stdout.decode() == demo[2]["text"]


class Stream(io.StringIO):
    """A stream that is a terminal or not."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize(
    ("wanted", "terminal", "environment", "expected"),
    [
        ("auto", True, {}, True),
        ("auto", True, {"NO_COLOR": ""}, True),  # empty is unset: no-color.org
        ("auto", True, {"NO_COLOR": "0"}, False),
        ("auto", True, {"TERM": "dumb"}, False),
        ("auto", False, {}, False),
        ("always", False, {"NO_COLOR": "1", "TERM": "dumb"}, True),
        ("never", True, {}, False),
    ],
)
def test_who_gets_colors(monkeypatch, wanted, terminal, environment, expected):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert colors(Stream(terminal), wanted) is expected


def test_trees_and_text_on_one_terminal_do_not_run_into_each_other(demo):
    shown, _ = on_terminal(*DEMO, "--show-tree=rounds", both=True)
    lines = ESCAPE.sub(b"", shown).decode().splitlines()
    headings = [line for line in lines if re.search(r"round \d+: ", line)]
    assert len(headings) == len(demo[2]["rounds"])
    assert all(line.startswith("round ") for line in headings)
    drafted = [line for line in lines if re.search(r"\d\.\d{3}  (accepted|rejected)$", line)]
    assert len(drafted) == sum(len(one["parents"]) - 1 for one in demo[2]["rounds"])
    for color, word in ((32, "accepted"), (31, "rejected"), (35, "bonus")):
        assert re.search(rb"\x1b\[%dm[^\x1b]*  %b\x1b\[0m" % (color, word.encode()), shown), word


def test_a_pipe_gets_the_same_bytes_with_and_without(pair):
    arguments = ["generate", *pair.options, *PROMPT, "--max-tokens", "40", "--ignore-eos"]
    plain = run(*arguments)
    for view in ("text", "rounds"):
        watched = run(*arguments, f"--show-tree={view}")
        assert watched.exit_code == 0, watched.stderr
        assert watched.stdout_bytes == plain.stdout_bytes
        assert "\x1b" not in watched.stderr
        assert ("tokens: drafted" in watched.stderr) == (view == "rounds")


def test_rounds_are_drawn_as_they_were(pair, tmp_path):
    path = tmp_path / "run.json"
    arguments = ["generate", *pair.options, *PROMPT, "--max-tokens", "20", "--ignore-eos"]
    for options, name in ((["--compare"], "speculative"), (["--budget", "1"], "autoregressive")):
        done = run(*arguments, "--show-tree=rounds", "--json", path, *options)
        rounds = json.loads(path.read_text())["runs"][name]["rounds"]
        expected = [
            f"round {number}: {len(one['parents']) - 1} drafted, {len(one['path']) - 1} accepted"
            for number, one in enumerate(rounds, 1)
        ]
        assert re.findall(r"^round \d+: .*$", done.stderr, re.MULTILINE) == expected
        drawn = re.findall(r"\d\.\d{3}  (accepted|rejected)$", done.stderr, re.MULTILINE)
        assert drawn.count("accepted") == sum(len(one["path"]) - 1 for one in rounds)
        assert len(drawn) == sum(len(one["parents"]) - 1 for one in rounds)
        assert len(re.findall(r" {2,}bonus$", done.stderr, re.MULTILINE)) == len(rounds)


def test_plain_decoding_is_all_bonus(pair):
    arguments = ["generate", *pair.options, *PROMPT, "--max-tokens", "9", "--ignore-eos"]
    plain = run(*arguments, "--budget", "1").stdout_bytes
    done = run(*arguments, "--budget", "1", "--show-tree", "--color", "always")
    assert ESCAPE.sub(b"", done.stdout_bytes) == plain
    assert MAGENTA in done.stdout_bytes
    assert GREEN not in done.stdout_bytes
    assert "\x1b[35mthe target's own (bonus)\x1b[0m" in done.stderr


def test_quiet_keeps_the_legend_from_stderr(pair):
    arguments = ["generate", *pair.options, *PROMPT, "--max-tokens", "4", "-q"]
    done = run(*arguments, "--show-tree", "--color", "always")
    assert done.stderr == ""
    assert MAGENTA in done.stdout_bytes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--show-tree=all"], "'all' is not one of 'text', 'rounds'"),
        (["--color", "always"], "--color needs --show-tree"),
        (["--show-tree=rounds", "-q"], "--show-tree=rounds prints on stderr"),
    ],
)
def test_contradictions_are_refused(pair, options, words):
    done = run("generate", *pair.options, *PROMPT, *options)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())


def test_escape_codes_of_a_model_reach_a_pipe(capsys):
    emit("\x1b[31mred", end="")
    assert capsys.readouterr().out == "\x1b[31mred"
