"""A tiny random pair in a folder, as the commands take it: target with tokenizer, draft."""

import json
from pathlib import Path
from typing import NamedTuple

from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.drafts import write_draft


class Pair(NamedTuple):
    """Folders of a target and its draft."""

    target: Path
    draft: Path

    @property
    def options(self) -> list[str]:
        """The options that name them."""
        return ["--model", str(self.target), "--draft", str(self.draft)]


def write_pair(folder: Path, family: str = "qwen3_5_moe", **config) -> Pair:
    """`config`: keywords of write_checkpoint."""
    target = write_checkpoint(folder / "target", family, **config)
    raw = json.loads((target / "config.json").read_text())
    write_tokenizer(target, raw.get("text_config", raw)["vocab_size"])
    return Pair(target, write_draft(folder / "draft", raw))
