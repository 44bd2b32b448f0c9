"""Where the demo pair and the prompts lie: what runs when none are named."""

from pathlib import Path

from specdec.errors import CheckpointError

FOLDER = Path(__file__).parent / "demo"
TARGET = FOLDER / "target"
DRAFT = FOLDER / "draft"
PROMPTS = FOLDER / "prompts.jsonl"
"""Held out from the pair's training: classes code and prose."""
WRITTEN = FOLDER / "prompts-written.jsonl"
"""Written for this project: classes mathematics and chat."""


def demo_pair() -> tuple[Path, Path]:
    """The folders of the demo's target and draft; CheckpointError where they were not installed."""
    for folder in (TARGET, DRAFT):
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder}: the demo pair is not part of this installation; name a --model"
            )
    return TARGET, DRAFT
