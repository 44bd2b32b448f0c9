"""`specdec report`: recorded runs as a page, as text, as Markdown or as JSON."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from specdec.commands.console import emit, tell
from specdec.durable import write_durably
from specdec.errors import RunFileError

if TYPE_CHECKING:
    from specdec.reports.report import Report

FORMATS = ("html", "text", "md", "json")


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN.json...")
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default=FORMATS[0],
    show_default=True,
    help="html is one page that needs no network.",
)
@click.option(
    "--output",
    "-o",
    metavar="FILE",
    help='Where to write; "-" is standard output. A file that is there is not replaced without '
    "--force.  [default: for html the first RUN with the ending .html, else standard output]",
)
@click.option("--force", is_flag=True, help="Replace a file that is there.")
@click.option("--quiet", "-q", is_flag=True, help="Do not say where the report is.")
def report(runs: tuple[str, ...], form: str, output: str | None, force: bool, quiet: bool) -> None:
    """Show what `generate --json` and `bench --json` wrote: speeds, acceptance, costs, trees.

    Several files are compared where they share prompts.
    """
    place = _place(runs[0], form, output)
    _check(place, runs, force)

    from specdec.reports.report import Report
    from specdec.run_file import read

    text = _renderer(form)(Report.of([read(Path(name)) for name in runs]))
    if place is None:
        emit(text)
        return
    write_durably(place, (text + "\n").encode(errors="replace"), RunFileError)
    if not quiet:
        tell(f"report: {place}")


def _place(first: str, form: str, output: str | None) -> Path | None:
    """The file to write, None for standard output."""
    if output is not None:
        return None if output == "-" else Path(output)
    if form != "html":
        return None
    if not Path(first).name:
        raise RunFileError(f"{first or repr(first)}: is no file, expected what a run wrote")
    return Path(first).with_suffix(".html")


def _check(place: Path | None, runs: tuple[str, ...], force: bool) -> None:
    """Refuse, before any work, to replace a file that nobody said may go, a run least of all."""
    doubled = next((name for at, name in enumerate(runs) if name in runs[:at]), None)
    if doubled is not None:
        raise RunFileError(f"{doubled}: named twice")
    if place is None:
        return
    # Of os.path: what may not be looked at is not there, and cannot be written either.
    there = os.path.exists(place)
    if there and any(os.path.exists(name) and os.path.samefile(place, name) for name in runs):
        raise RunFileError(f"--output {place}: is one of the runs")
    if there and not place.is_file():
        raise RunFileError(f"--output {place}: exists and is not a file")
    if there and not force:
        raise RunFileError(f"{place}: exists; --force replaces it, --output FILE names another")
    if not os.path.isdir(place.parent):
        raise RunFileError(f"--output {place}: {place.parent} is no folder")


def _renderer(form: str) -> "Callable[[Report], str]":
    if form == "html":
        from specdec.reports.page import page

        return page
    from specdec.reports import formats

    return {"text": formats.text, "md": formats.markdown, "json": formats.as_json}[form]
