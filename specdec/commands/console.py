"""What a command prints: results on stdout, everything else on stderr.

A stdout whose reader has gone, or that cannot be written, ends the command with an error; a stderr
of that kind is done without.
"""

import os
import sys
from collections.abc import Callable
from time import monotonic
from typing import TextIO

import click

from specdec.errors import OutputClosedError, SpecdecError

REFRESH_SECONDS = 0.1


def emit(text: str, end: str = "\n") -> None:
    """Write a result to stdout, at once and as it is: a model's text may hold escape codes."""
    try:
        click.echo(text + end, nl=False, color=True)  # False and None would take them out
    except BrokenPipeError as error:
        _discard(sys.stdout)
        raise OutputClosedError("standard output was closed by its reader") from error
    except OSError as error:
        _discard(sys.stdout)
        raise SpecdecError(f"standard output cannot be written: {error.strerror}") from error


def tell(text: str, end: str = "\n") -> None:
    """Write to stderr."""
    try:
        click.echo(text + end, nl=False, err=True, color=True)
    except OSError:  # nowhere is left to say so
        _discard(sys.stderr)


class Console:
    """Notes, headings and a progress line; `quiet` keeps only notes."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def note(self, text: str) -> None:
        """Something the user must know, quiet or not."""
        tell(text)

    def say(self, text: str = "") -> None:
        """Something the user may want to know."""
        if not self.quiet:
            tell(text)

    def progress(self, label: str) -> Callable[[int, int], None]:
        """A callback (done, total) that redraws one line on a terminal and is silent elsewhere."""
        line = self.line()

        def draw(done: int, total: int) -> None:
            share = f"{done / total:4.0%}" if total else ""
            if line is not None:
                line(lambda: f"{label} {share}", done >= total)

        return draw

    def line(self) -> Callable[[Callable[[], str], bool], None] | None:
        """What redraws one line of a terminal, (words, whether these are the last): words are
        asked for only when they are drawn. None where nobody would see it."""
        if self.quiet or not sys.stderr.isatty():
            return None
        drawn = 0.0

        def draw(words: Callable[[], str], last: bool) -> None:
            nonlocal drawn
            if last or monotonic() - drawn >= REFRESH_SECONDS:
                drawn = monotonic()
                tell(f"\r{words()}\x1b[K", "\n" if last else "")

        return draw


def _discard(stream: TextIO) -> None:
    """What could not be written would be tried again, and fail again, at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
