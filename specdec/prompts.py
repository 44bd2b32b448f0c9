"""Prompt files: JSON lines {"id", "class", "prompt"}.

Refuses files with missing fields, repeated ids, text that is none, or classes nobody wrote for.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from specdec.errors import PromptError

ALL = "all"
"""The class that holds every prompt."""


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file: {"id", "class", "prompt"}."""

    id: str
    kind: str
    text: str


def read_prompts(path: Path) -> tuple[Prompt, ...]:
    """The prompts of a JSON-lines file; PromptError names the file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise PromptError(f"{path}: cannot be read: {error}") from error
    prompts: list[Prompt] = []
    for at, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise PromptError(f"{path}:{at}: not JSON: {error}") from error
        fields = ("id", "class", "prompt")
        if not isinstance(value, dict) or not all(
            isinstance(value.get(field), str) and value[field] for field in fields
        ):
            raise PromptError(
                f'{path}:{at}: expected an object with non-empty texts "id", "class" and "prompt"'
            )
        if any(prompt.id == value["id"] for prompt in prompts):
            raise PromptError(f"{path}:{at}: id {value['id']!r} stands there twice")
        if value["class"] == ALL:
            raise PromptError(f'{path}:{at}: class "{ALL}" is the name of the total')
        try:
            value["prompt"].encode()
        except UnicodeError as error:
            raise PromptError(f"{path}:{at}: the prompt is not text: {error}") from error
        prompts.append(Prompt(value["id"], value["class"], value["prompt"]))
    if not prompts:
        raise PromptError(f"{path}: holds no prompt")
    return tuple(prompts)


def of_classes(prompts: tuple[Prompt, ...], classes: Collection[str]) -> tuple[Prompt, ...]:
    """The prompts of these classes, in their order; PromptError for a class that has none."""
    known = dict.fromkeys(prompt.kind for prompt in prompts)
    for name in classes:
        if name not in known:
            raise PromptError(f"no prompt is of class {name!r}; there are {', '.join(known)}")
    return tuple(prompt for prompt in prompts if prompt.kind in classes)
