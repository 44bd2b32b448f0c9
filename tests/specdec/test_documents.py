"""What the documents promise exists: tests, folders, commands, options."""

import re
import shlex
from pathlib import Path

import click
import pytest

from specdec.cli import main

ROOT = Path(__file__).parents[2]


def test_every_test_that_contributing_names_exists():
    rows = re.findall(r"\| `(tests/[\w/]+\.py)`: (.*) \|", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(rows) > 30
    for path, tests in rows:
        source = (ROOT / path).read_text()
        for name in re.findall(r"`(\w+)`", tests):
            assert f"def {name}(" in source, (path, name)


def test_every_file_that_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    tree = text.partition("## The house")[2].partition("\n## ")[0]
    folder = ROOT
    for indent, name in re.findall(r"^( {4}| {6})([\w./]+) ", tree, re.MULTILINE):
        folder = ROOT / name if len(indent) == 4 else folder
        path = folder if len(indent) == 4 else folder / name
        assert path.exists(), path
    for link in re.findall(r"\]\(([\w./]+)\)", text):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize(
    "document", ["README.md", "docs/metrics.md", "docs/streaming.md", "CONTRIBUTING.md"]
)
def test_every_command_line_in_the_documents_parses(document):
    """Every `specdec ...` line names a command and options that exist."""
    text = (ROOT / document).read_text()
    lines = re.findall(r"(?:^    |&& |`)(specdec [a-z][^`\n]*)", text, re.MULTILINE)
    assert lines or document != "README.md"
    for line in lines:
        _, name, *arguments = shlex.split(line.partition(" > ")[0].partition(" && ")[0])
        if name.isupper():
            continue
        command = main.commands[name]
        known = {flag for option in command.params for flag in option.opts}
        used = {word for word in arguments if word.startswith("-")}
        assert used <= known | {"--help"}, line


def test_every_option_has_help():
    for command in main.commands.values():
        for option in command.params:
            assert not isinstance(option, click.Option) or option.help, (command.name, option)
