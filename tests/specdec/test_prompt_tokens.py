"""Prompts brought to a length: exact, from real text, the same every time."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.errors import PromptError
from specdec.prompt_tokens import PromptTokens
from specdec.prompts import Prompt
from specdec.tokenizer import Tokenizer
from tests.checkpoints import write_checkpoint, write_tokenizer

PROMPTS = (
    Prompt("a", "code", "def one(x):"),
    Prompt("b", "prose", "Once upon a time there was a king."),
    Prompt("c", "code", "class Two:"),
    Prompt("d", "chat", "Hello, who are you?"),
    Prompt("e", "code", "import three"),
)
AROUND = {"a": "cebd", "b": "cdea", "c": "eadb", "d": "eabc", "e": "acbd"}
"""Which prompts stand in front of one, the nearest first: its own class, then the others."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("tokens"), "qwen3_5_moe")
    return Tokenizer.open(write_tokenizer(folder))


def texts(of, tokenizer):
    return {p.id: tokenizer.encode(p.text + "\n\n", add_special=False) for p in of}


@given(st.sampled_from(PROMPTS), st.integers(1, 400))
def test_a_length_is_met_with_the_text_around(tokenizer, prompt, length):
    made = PromptTokens(PROMPTS, tokenizer, raw=True)
    found = made.of(prompt, length)
    assert len(found) == length
    assert found == PromptTokens(PROMPTS, tokenizer, raw=True).of(prompt, length)
    bare = tokenizer.encode(prompt.text, add_special=False)
    pieces = texts(PROMPTS, tokenizer)
    around = [pieces[name] for name in AROUND[prompt.id]] * 20
    whole = [token for piece in reversed(around) for token in piece] + bare
    assert list(found) == whole[-length:]


def test_text_comes_twice_only_beyond_all_of_it(tokenizer):
    made = PromptTokens(PROMPTS, tokenizer, raw=True)
    lengths = [len(one) for one in texts(PROMPTS, tokenizer).values()]
    assert made.longest_without_repeats == list(accumulate(lengths))[-1]
    whole = made.of(PROMPTS[0], made.longest_without_repeats - 2)  # less the end of the line
    text = tokenizer.backend.decode(list(whole))
    assert all(text.count(prompt.text) == 1 for prompt in PROMPTS)
    longer = tokenizer.backend.decode(list(made.of(PROMPTS[0], 2 * len(whole))))
    assert all(longer.count(prompt.text) == 2 for prompt in PROMPTS[1:])


def test_a_single_prompt_leads_to_itself(tokenizer):
    made = PromptTokens(PROMPTS[:1], tokenizer)
    text = tokenizer.backend.decode(list(made.of(PROMPTS[0], 100)))
    assert text.endswith("def one(x):\n\ndef one(x):\n\ndef one(x):")


def test_without_a_length_a_prompt_is_as_it_is(tokenizer):
    made = PromptTokens(PROMPTS, tokenizer)
    assert list(made.of(PROMPTS[0])) == tokenizer.encode("def one(x):")


def test_chat_goes_through_the_template_unless_raw(tokenizer):
    expected = tokenizer.apply_template([{"role": "user", "content": PROMPTS[3].text}])
    chat = PromptTokens(PROMPTS, tokenizer).of(PROMPTS[3])
    assert tokenizer.backend.decode(list(chat), skip_special_tokens=False) == expected
    raw = PromptTokens(PROMPTS, tokenizer, raw=True).of(PROMPTS[3])
    assert tokenizer.backend.decode(list(raw)) == PROMPTS[3].text
    longer = PromptTokens(PROMPTS, tokenizer).of(PROMPTS[3], len(chat) + 9)
    assert longer[-len(chat) :] == chat


def test_what_a_tokenizer_begins_with_stays_at_the_beginning(tokenizer):
    class Starting:
        """The same tokenizer with a token at the start of every text."""

        has_template = False

        def encode(self, text, add_special=True):
            return [99999] * add_special + tokenizer.encode(text, add_special=False)

    made = PromptTokens(PROMPTS, Starting())  # type: ignore[arg-type]
    for length in (3, 200):
        found = made.of(PROMPTS[1], length)
        assert found[0] == 99999
        assert 99999 not in found[1:]
        assert len(found) == length


def test_an_error_names_the_prompt(tokenizer, monkeypatch):
    def broken(messages):
        raise PromptError("the template refuses")

    monkeypatch.setattr(tokenizer, "apply_template", broken)
    with pytest.raises(PromptError, match="prompt 'd': the template refuses"):
        PromptTokens(PROMPTS, tokenizer).of(PROMPTS[3])
