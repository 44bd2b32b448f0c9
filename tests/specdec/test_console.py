"""The progress line: drawn on a terminal, silent elsewhere."""

import io
import sys

from specdec.commands.console import Console


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self):
        return True


def test_progress_on_a_terminal_ends_with_a_new_line(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    draw = Console(quiet=False).progress("loading:")
    for done in range(1, 101):
        draw(done, 100)
    assert screen.getvalue().count("\r") < 50  # not redrawn for every step
    assert screen.getvalue().endswith("\rloading: 100%\x1b[K\n")


def test_progress_is_silent_elsewhere_and_when_quiet(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    Console(quiet=False).progress("loading:")(1, 2)
    assert pipe.getvalue() == ""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    Console(quiet=True).progress("loading:")(1, 1)
    assert screen.getvalue() == ""


def test_quiet_keeps_notes(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    console = Console(quiet=True)
    console.say("said")
    console.note("noted")
    assert pipe.getvalue() == "noted\n"
