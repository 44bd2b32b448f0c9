"""Watching a run: its text coloured by where the tokens came from, and every round's tree.

Without colours the text is the same to the byte as without watching.
"""

import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

import click

from specdec.commands.console import Console, emit, tell

if TYPE_CHECKING:
    from specdec.round import Round
    from specdec.tokenizer import Tokenizer
    from specdec.writer import Piece

COLORS = {"accepted": "green", "bonus": "magenta", "rejected": "red"}
VIEWS = ("text", "rounds")


def watch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--show-tree, --color."""
    for option in (
        click.option(
            "--color",
            type=click.Choice(["auto", "always", "never"]),
            default="auto",
            show_default=True,
            help="Colours of --show-tree; auto: on a terminal, unless NO_COLOR is set.",
        ),
        click.option(
            "--show-tree",
            type=click.Choice(VIEWS),
            is_flag=False,
            flag_value=VIEWS[0],
            help="Colour accepted and bonus tokens in the text; =rounds: also draw each round's "
            "tree on stderr.",
        ),
    ):
        command = option(command)
    return command


def check(options: Mapping[str, Any]) -> None:
    """UsageError where the options contradict each other."""
    if options["color"] != "auto" and options["show_tree"] is None:
        raise click.UsageError("--color needs --show-tree: nothing else is coloured.")
    if options["quiet"] and options["show_tree"] == "rounds":
        raise click.UsageError("--show-tree=rounds prints on stderr what --quiet keeps from it.")


class Watch:
    """Where the text of a run goes, and its rounds."""

    def __init__(
        self, options: Mapping[str, Any], tokenizer: "Tokenizer", console: Console
    ) -> None:
        self._tokenizer, self._rounds = tokenizer, 0
        self._shows_trees = options["show_tree"] == "rounds"
        coloured = options["show_tree"] is not None
        self._text_color = coloured and colors(sys.stdout, options["color"])
        self._tree_color = coloured and colors(sys.stderr, options["color"])
        self._open = False  # whether a line of text stands unfinished on the terminal
        if coloured and (self._text_color or self._shows_trees):
            console.say(self._legend())

    @property
    def on_terminal(self) -> bool:
        """Whether what is shown runs over the terminal that stderr writes to, if it is one."""
        return self._shows_trees or sys.stdout.isatty()

    @property
    def on_round(self) -> "Callable[[Round], None] | None":
        """What draws a round; None where none is drawn."""
        return self._round if self._shows_trees else None

    def text(self, piece: "Piece") -> None:
        """Show text that became certain."""
        self._open = not piece.text.endswith("\n")
        if not self._text_color:
            emit(piece.text, end="")
            return
        spans = ((span.text, "accepted" if span.accepted else "bonus") for span in piece.spans)
        emit("".join(_styled(text, role) for text, role in spans), end="")

    def _round(self, one: "Round") -> None:
        from specdec.round_drawing import ROOT, draw

        self._rounds += 1
        if self._open and sys.stdout.isatty():
            tell("")
            self._open = False
        for line in draw(one, self._rounds, self._tokenizer.token_bytes):
            plain = not self._tree_color or line.role == ROOT
            tell(line.text if plain else _styled(line.text, line.role))

    def _legend(self) -> str:
        words = {"accepted": "drafted and accepted", "bonus": "the target's own (bonus)"}
        if self._shows_trees:
            words |= {"rejected": "drafted and rejected"}
        told = (_styled(text, role) if self._tree_color else text for role, text in words.items())
        weight = "; numbers: the draft's probability of the path" if self._shows_trees else ""
        return f"tokens: {', '.join(told)}{weight}"


def _styled(text: str, role: str) -> str:
    return click.style(text, fg=COLORS[role])


def colors(stream: TextIO, wanted: str) -> bool:
    """Whether `stream` gets colours. NO_COLOR: see no-color.org."""
    if wanted != "auto":
        return wanted == "always"
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
