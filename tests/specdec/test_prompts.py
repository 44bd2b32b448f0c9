"""Prompt files, their classes, and the ones that ship."""

import pytest

from specdec.demo_pair import PROMPTS, WRITTEN
from specdec.errors import PromptError
from specdec.prompts import Prompt, of_classes, read_prompts


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"id": "a", "class": "python", "prompt": "def f"}\n\n'
        '{"id": "b", "class": "prose", "prompt": "Grüße\\n", "note": 1}\n'
    )
    assert read_prompts(path) == (
        Prompt("a", "python", "def f"),
        Prompt("b", "prose", "Grüße\n"),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no prompt"),
        ("{", ":1: not JSON"),
        ("[1]", ":1: expected an object"),
        ('{"id": "a", "class": "x"}', ":1: expected an object"),
        ('{"id": "a", "class": "x", "prompt": ""}', ":1: expected an object"),
        ('{"id": "a", "class": "all", "prompt": "p"}', "is the name of the total"),
        ('{"id": "a", "class": "x", "prompt": "p"}\n' * 2, ":2: id 'a' stands there twice"),
    ],
)
def test_broken_prompt_files_are_named(tmp_path, text, words):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(PromptError, match=f"prompts.jsonl.*{words}"):
        read_prompts(path)


def test_a_missing_prompt_file_is_named(tmp_path):
    with pytest.raises(PromptError, match=r"nope\.jsonl: cannot be read"):
        read_prompts(tmp_path / "nope.jsonl")


def test_a_choice_of_classes():
    prompts = tuple(Prompt(str(n), kind, "p") for n, kind in enumerate("aabc"))
    assert [one.id for one in of_classes(prompts, ("c", "a"))] == ["0", "1", "3"]
    with pytest.raises(PromptError, match="no prompt is of class 'd'; there are a, b, c"):
        of_classes(prompts, ("a", "d"))


def test_the_shipped_prompts():
    held_out, written = read_prompts(PROMPTS), read_prompts(WRITTEN)
    assert {prompt.kind for prompt in held_out} == {"code", "prose"}
    assert {prompt.kind for prompt in written} == {"mathematics", "chat"}
    assert len(held_out) >= 20
    assert len({prompt.id for prompt in held_out + written}) == len(held_out + written)
