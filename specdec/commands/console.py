"""What a command says while it works. All of it goes to stderr: stdout belongs to the text."""

import sys
from collections.abc import Callable
from time import monotonic

import click

REFRESH_SECONDS = 0.1


class Console:
    """Notes, headings and a progress line; `quiet` keeps only notes."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def note(self, text: str) -> None:
        """Something the user must know, quiet or not."""
        click.echo(text, err=True)

    def say(self, text: str = "") -> None:
        """Something the user may want to know."""
        if not self.quiet:
            click.echo(text, err=True)

    def progress(self, label: str) -> Callable[[int, int], None]:
        """A callback (done, total) that redraws one line on a terminal and is silent elsewhere."""
        if self.quiet or not sys.stderr.isatty():
            return lambda done, total: None
        drawn = 0.0

        def draw(done: int, total: int) -> None:
            nonlocal drawn
            if done < total and monotonic() - drawn < REFRESH_SECONDS:
                return
            drawn = monotonic()
            share = f"{done / total:4.0%}" if total else ""
            end = "\n" if done >= total else ""
            click.echo(f"\r{label} {share}\x1b[K{end}", nl=False, err=True)

        return draw
