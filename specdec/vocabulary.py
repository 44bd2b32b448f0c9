"""Vocabulary: the text of the tokens that a document names, so that a reader needs no tokenizer.

A token is whole characters, or some bytes of one: it is written as text or as a list of bytes.
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specdec.bench import Run
    from specdec.generation import Result
    from specdec.tokenizer import Tokenizer

Vocabulary = Mapping[str, str | list[int]]
"""Token id, in decimal as JSON has it -> its text, or its bytes where they are no text alone."""


def vocabulary(
    tokenizer: "Tokenizer", runs: "Iterable[Result | Run]"
) -> dict[str, str | list[int]]:
    """Every token that the runs emitted or drafted, ids ascending."""
    used: set[int] = set()
    for run in runs:
        used.update(run.tokens)
        for one in run.rounds:
            used.update(one.tree.tokens.tolist())
            used.add(one.bonus)
    return {str(token): _text(tokenizer.token_bytes(token)) for token in sorted(used)}


def pieces(texts: Vocabulary, tokens: Sequence[int]) -> list[str]:
    """Per token the text that it completes: a character split over tokens stands at its last.

    An unfinished character at the end is U+FFFD there.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    last = len(tokens) - 1
    return [
        decoder.decode(token_bytes(texts, token), final=at == last)
        for at, token in enumerate(tokens)
    ]


def token_bytes(texts: Vocabulary, token: int) -> bytes:
    """The bytes that a token stands for; "<id>" for one that the vocabulary does not have."""
    text = texts.get(str(token), f"<{token}>")
    return text.encode() if isinstance(text, str) else bytes(text)


def _text(raw: bytes) -> str | list[int]:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)
