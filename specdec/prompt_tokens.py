"""PromptTokens: the tokens that a benchmark's prompts become, brought to a length where asked.

A prompt that is too long loses its beginning. One that is too short gets text in front of it: the
other prompts of its file, those of its class first, each once around before any comes again.
"""

from collections.abc import Sequence

from specdec.errors import PromptError
from specdec.prompts import Prompt
from specdec.tokenizer import Tokenizer

CHAT = "chat"
"""The class whose prompts a user would say to an assistant."""


class PromptTokens:
    """The tokens of prompts, a function of the prompts and the tokenizer alone."""

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Tokenizer, raw: bool = False) -> None:
        """prompts: all of the file, whether they are run or not: they are each other's padding.

        raw: whether prompts of class chat are taken without the model's chat template, too.
        """
        self._prompts, self._tokenizer = tuple(prompts), tokenizer
        self._template = tokenizer.has_template and not raw
        self._bare = {one.id: tokenizer.encode(one.text + "\n\n", False) for one in prompts}

    @property
    def longest_without_repeats(self) -> int:
        """The greatest length for which no text comes twice."""
        return sum(map(len, self._bare.values()))

    def of(self, prompt: Prompt, length: int | None = None) -> tuple[int, ...]:
        """The prompt's tokens, exactly `length` of them where it is given.

        PromptError names the prompt if its template or text cannot be encoded.
        """
        try:
            start, tokens = self._encode(prompt)
        except PromptError as error:
            raise PromptError(f"prompt {prompt.id!r}: {error}") from error
        if length is None:
            return (*start, *tokens)
        start = start[:length]
        room = length - len(start)
        if len(tokens) < room:
            tokens = [*self._padding(prompt, room - len(tokens)), *tokens]
        return (*start, *tokens[len(tokens) - room :])

    def _encode(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """What the tokenizer begins every text with, and the prompt after it."""
        if self._template and prompt.kind == CHAT:
            text = self._tokenizer.apply_template([{"role": "user", "content": prompt.text}])
            return [], self._tokenizer.encode(text, add_special=False)
        whole = self._tokenizer.encode(prompt.text)
        bare = self._tokenizer.encode(prompt.text, add_special=False)
        cut = len(whole) - len(bare)
        return (whole[:cut], bare) if whole[cut:] == bare else ([], whole)

    def _padding(self, prompt: Prompt, count: int) -> list[int]:
        """`count` tokens of the prompts that follow this one, round and round."""
        at = self._prompts.index(prompt)
        around = [*self._prompts[at + 1 :], *self._prompts[:at]]
        around.sort(key=lambda one: one.kind != prompt.kind)  # stable: its own class first
        around = around or [prompt]
        tokens: list[int] = []
        number = 0
        while len(tokens) < count:  # in front of what is there: the nearest prompt stands next
            tokens = [*self._bare[around[number % len(around)].id], *tokens]
            number += 1
        return tokens[len(tokens) - count :]
