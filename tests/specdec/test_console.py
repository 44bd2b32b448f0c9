"""The progress line: drawn on a terminal, silent elsewhere."""

import io
import sys

from specdec.commands.console import Console
from specdec.commands.live import LiveLine
from specdec.target.read_queue import ReadCounters


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


class Cache:
    """As much of an ExpertCache as the live line asks for."""

    def slot_requests(self):
        return 3, 1

    def foreseen(self):
        return 3

    def reads(self):
        return ReadCounters(2_000_000, 7, 0.5)


def test_a_run_on_a_terminal_shows_how_it_goes(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    live = LiveLine(Console(quiet=False), Cache(), "speculative:", 5, shown=False)
    for _ in range(3):
        live.text()
    live.end()
    assert "\rspeculative: 3/5 tokens, " in screen.getvalue()
    assert screen.getvalue().endswith(
        "tok/s, slots 75.0 % hit, 2.00 MB read, 75.0 % of misses foreseen\x1b[K\n"
    )


def test_the_live_line_does_not_run_into_the_text(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    live = LiveLine(Console(quiet=False), Cache(), "x:", 2, shown=True)
    live.text()
    live.end()
    assert screen.getvalue() == ""
    LiveLine(Console(quiet=False), Cache(), "x:", 1, shown=False).text()
    assert screen.getvalue().endswith("\n")
