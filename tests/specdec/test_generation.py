"""Where a text ends, and that it does not depend on how its tokens came.

Most tests run a scripted engine, which emits given tokens in rounds of given sizes; the last ones a
real target with a draft that cheats.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.engine import Engine
from specdec.errors import PlanError, PromptError
from specdec.generation import Request, generate
from specdec.round import PhaseSeconds, Prefill, Round
from specdec.tokenizer import Tokenizer
from specdec.tree.build import KINDS
from specdec.writer import Piece
from tests.backends import each_backend
from tests.cheating import CheatingDraft
from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.results import chain
from tests.targets import load_target

EOS, OTHER_EOS = 319, 317
VOCABULARY = 1000
PROMPT = (1, 2, 3)
TEXTS = ["", "plain", "stop and go", "a\u00e9\u20ac\U0001f600z", "aab aab", "\u20ac\u20ac"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.open(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


class Script:
    """An engine that emits `tokens`, the first as the prompt's, then in rounds of `sizes`.

    interrupt: raise KeyboardInterrupt instead of round number `interrupt`; 0 is the prompt.
    """

    def __init__(self, tokens, sizes=(1,), interrupt=None, context=1000) -> None:
        self.tokens, self.sizes, self.interrupt = list(tokens), sizes, interrupt
        experts = SimpleNamespace(
            reset_counters=lambda: None, counters=lambda: (), reads=lambda: None, streaming=None
        )
        config = SimpleNamespace(max_position=context, vocab_size=VOCABULARY)
        prefetcher = SimpleNamespace(reset=lambda: None, use=lambda: None)
        self.target = SimpleNamespace(
            config=config, experts=experts, tolerance=None, clock=None, prefetcher=prefetcher
        )
        self.context = self.max_budget = None

    def prefill(self, tokens, drafting, on_progress, sampling) -> Prefill:
        if self.interrupt == 0:
            raise KeyboardInterrupt
        self.done, self.number = 1, 0
        return Prefill(self.tokens[0], len(tokens), 0.0)

    def step(self, budget, kind) -> Round:
        self.number += 1
        if self.number == self.interrupt:
            raise KeyboardInterrupt
        size = self.sizes[(self.number - 1) % len(self.sizes)]
        *path, bonus = self.tokens[self.done : self.done + size]
        self.done += size
        tree = chain(self.tokens[self.done - size - 1], path)
        return Round(tree, tuple(range(len(path) + 1)), bonus, PhaseSeconds())


def run(tokenizer, tokens, sizes=(1,), interrupt=None, context=1000, **request):
    """The result, and the pieces of text that were shown."""
    engine: Any = Script(tokens, sizes, interrupt, context)
    pieces: list[str] = []
    request = {"prompt_tokens": PROMPT, "max_tokens": len(tokens), "eos_ids": (EOS,), **request}
    result = generate(
        engine, tokenizer, Request(**request), lambda piece: pieces.append(piece.text)
    )
    assert "".join(pieces) == result.text
    assert all(pieces)
    return result, pieces


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special=False)


@pytest.mark.parametrize("sizes", [(1,), (2,), (4,), (7, 1)])
def test_an_end_token_ends_the_text_inside_an_accepted_path_too(tokenizer, sizes):
    tokens = [*ids(tokenizer, "one two"), EOS, *ids(tokenizer, " three four five")]
    result, _ = run(tokenizer, tokens, sizes)
    assert result.finish == "eos"
    assert result.text == "one two"
    assert result.tokens == tuple(tokens[: tokens.index(EOS) + 1])


def test_an_end_token_may_be_the_first_and_may_be_one_of_several(tokenizer):
    result, pieces = run(tokenizer, [EOS, 1, 2])
    assert (result.finish, result.text, result.tokens) == ("eos", "", (EOS,))
    assert result.rounds == ()
    assert pieces == []
    tokens = [*ids(tokenizer, "ab"), OTHER_EOS, EOS, 65]
    result, _ = run(tokenizer, tokens, (3,), eos_ids=(EOS, OTHER_EOS))
    assert result.tokens[-1] == OTHER_EOS
    assert result.text == "ab"


def test_without_end_tokens_the_text_goes_on(tokenizer):
    tokens = [*ids(tokenizer, "ab"), EOS, *ids(tokenizer, "cd")]
    result, _ = run(tokenizer, tokens, (2,), eos_ids=())
    assert result.finish == "length"
    assert result.tokens == tuple(tokens)
    assert result.text == "ab<|im_end|>cd"


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("sizes", [(1,), (3,), (8,)])
def test_the_token_limit_holds_inside_an_accepted_path(tokenizer, limit, sizes):
    tokens = [ids(tokenizer, letter)[0] for letter in "abcdefghijklmnopqrst"]
    result, _ = run(tokenizer, tokens, sizes, max_tokens=limit)
    assert result.finish == "length"
    assert result.tokens == tuple(tokens[:limit])
    assert result.text == "abcdefghijklmnopqrst"[:limit]


def test_the_models_context_ends_the_text(tokenizer):
    tokens = ids(tokenizer, "xyzxyzxyzxyz")
    for room in (1, 4):
        context = len(PROMPT) + room
        result, _ = run(tokenizer, tokens, (3,), context=context, max_tokens=100)
        assert result.finish == "context"
        assert result.tokens == tuple(tokens[:room])
        result, _ = run(tokenizer, tokens, (3,), context=context, max_tokens=room)
        assert result.finish == "length"  # that was asked for


@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (9,)])
def test_a_stop_string_over_tokens_and_rounds(tokenizer, sizes):
    tokens = [ids(tokenizer, letter)[0] for letter in "one STOP two"]
    result, _ = run(tokenizer, tokens, sizes, stop=("STOP",))
    assert result.finish == "stop"
    assert result.text == "one "
    assert result.tokens == tuple(tokens[: len("one STOP")])


def test_the_beginning_of_a_stop_string_is_shown_when_the_text_ends_otherwise(tokenizer):
    tokens = [ids(tokenizer, letter)[0] for letter in "one STO"]
    result, pieces = run(tokenizer, tokens, (2,), stop=("STOP",))
    assert (result.finish, result.text) == ("length", "one STO")
    assert pieces[-1] == "STO"
    result, _ = run(tokenizer, [*tokens, EOS, 3, 3], (2,), stop=("STOP",))
    assert (result.finish, result.text) == ("eos", "one STO")


@pytest.mark.parametrize("sizes", [(1,), (2,), (5,)])
def test_characters_are_never_split(tokenizer, sizes):
    text = "a\u00e9\u20ac\U0001f600z"
    tokens = list(text.encode())
    byte_ids = {tokenizer.token_bytes(i): i for i in range(256)}
    tokens = [byte_ids[bytes([byte])] for byte in tokens]
    result, pieces = run(tokenizer, tokens, sizes)
    assert pieces == list(text)
    assert result.text == text
    half, pieces = run(tokenizer, tokens[:8], sizes)  # cut inside the emoji
    assert half.text == "a\u00e9\u20ac\ufffd"
    result, _ = run(tokenizer, tokens, sizes, stop=("\u20ac",))
    assert (result.finish, result.text) == ("stop", "a\u00e9")


@given(
    text=st.text("ab \u00e9\u20ac", min_size=1, max_size=20),
    stop=st.lists(st.text("ab \u00e9\u20ac", min_size=1, max_size=3), max_size=2),
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    end=st.integers(0, 25),
    limit=st.integers(1, 25),
)
def test_where_a_text_ends_does_not_depend_on_the_rounds(tokenizer, text, stop, sizes, end, limit):
    tokens = ids(tokenizer, text)
    tokens = [*tokens[:end], EOS, *tokens[end:], *[3] * 60]
    requests = {"stop": tuple(stop), "max_tokens": limit}
    one, shown_one = run(tokenizer, tokens, **requests)
    many, shown_many = run(tokenizer, tokens, sizes, **requests)
    for field in ("tokens", "text", "finish", "token_sha256"):
        assert getattr(one, field) == getattr(many, field)
    assert shown_one == shown_many


@pytest.mark.parametrize("interrupt", [0, 1, 3])
def test_an_interrupt_keeps_what_was_emitted(tokenizer, interrupt):
    tokens = ids(tokenizer, "xyzxyzxyz")
    result, _ = run(tokenizer, tokens, (2,), interrupt=interrupt)
    assert result.finish == "interrupted"
    emitted = 0 if interrupt == 0 else 1 + 2 * (interrupt - 1)
    assert result.tokens == tuple(tokens[:emitted])
    assert result.text == "xyzxyzxyz"[:emitted]
    assert len(result.rounds) == max(interrupt - 1, 0)
    assert result.prefill.prompt_tokens == 3
    if interrupt == 0:
        assert result.prefill.token is None
        assert result.decode_seconds == 0


def test_an_interrupt_while_text_is_shown(tokenizer):
    shown: list[str] = []

    def show(piece: Piece) -> None:
        shown.append(piece.text)
        if len(shown) == 4:
            raise KeyboardInterrupt

    engine: Any = Script(ids(tokenizer, "xyzxyzxyz"), (5,))
    result = generate(engine, tokenizer, Request(PROMPT), show)
    assert result.finish == "interrupted"
    assert result.text == "".join(shown) == "xyzx"
    assert len(result.tokens) == 4


def test_prompts_that_are_empty_or_leave_no_room(tokenizer):
    with pytest.raises(PromptError, match="empty"):
        run(tokenizer, [1], prompt_tokens=())
    for length in (10, 11):
        with pytest.raises(PromptError, match=rf"{length} tokens.*context is 10"):
            run(tokenizer, [1], prompt_tokens=(1,) * length, context=10)
    result, _ = run(tokenizer, [1], prompt_tokens=(1,) * 9, context=10, max_tokens=5)
    assert result.finish == "context"


def test_a_prompt_of_another_model(tokenizer):
    """A tokenizer with more tokens than the model would read beyond the embedding's end."""
    run(tokenizer, [1], prompt_tokens=(1, VOCABULARY - 1))
    with pytest.raises(PromptError, match=f"token {VOCABULARY}.*ends at {VOCABULARY - 1}"):
        run(tokenizer, [1], prompt_tokens=(1, VOCABULARY, 2))


def test_a_request_beyond_the_memory_plan(tokenizer):
    engine: Any = Script([1, 2, 3, 4])
    engine.context, engine.max_budget = len(PROMPT) + 3, 4
    fits = Request(PROMPT, budget=4, max_tokens=3)
    assert generate(engine, tokenizer, fits).finish == "length"
    for beyond, words in (
        (replace(fits, max_tokens=4), "context"),
        (replace(fits, budget=5), "budget 5"),
    ):
        with pytest.raises(PlanError, match=words):
            generate(engine, tokenizer, beyond)


def test_token_hash(tokenizer):
    """Of the tokens as little-endian int32, nothing else."""
    first, _ = run(tokenizer, [1, 2, 300])
    second, _ = run(tokenizer, [1, 2, 300], (2,))
    assert first.token_sha256 == second.token_sha256
    other, _ = run(tokenizer, [1, 2, 301])
    assert first.token_sha256 != other.token_sha256
    assert len(first.token_sha256) == 64


class Real:
    """A tiny target with its true continuation of a prompt, and engines that cheat on it."""

    def __init__(self, folder, backend) -> None:
        self.folder = folder
        self.prompt = tuple(np.random.default_rng(3).integers(0, 300, 20).tolist())
        self.target = load_target(folder, backend, pins=1, slots=4)
        self.tokenizer = Tokenizer.open(folder)
        ar = Request(self.prompt, budget=1, max_tokens=60)
        self.truth = generate(Engine(self.target), self.tokenizer, ar)

    def engine(self, **options) -> Engine:
        draft: Any = CheatingDraft(self.truth.tokens, len(self.prompt), 320, **options)
        return Engine(self.target, draft)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    made: dict[str, Real] = {}

    def make(backend) -> Real:
        if backend.name not in made:
            folder = tmp_path_factory.mktemp("real")
            # 20 tokens of prompt, 80 of text
            write_checkpoint(folder, "qwen3_5_moe", max_position_embeddings=100)
            made[backend.name] = Real(write_tokenizer(folder), backend)
        return made[backend.name]

    yield make
    for one in made.values():
        one.target.experts.store.checkpoint.close()


@each_backend
@given(
    budget=st.integers(2, 24),
    kind=st.sampled_from(KINDS),
    limit=st.integers(1, 50),
    start=st.integers(0, 45),
    length=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_results_do_not_depend_on_the_budget(
    real, backend, budget, kind, limit, start, length, seed
):
    """Stop strings and end tokens taken from the text itself, so that they do occur."""
    one = real(backend)
    text = one.truth.text[start : start + length].replace("\ufffd", "")
    stop = (text,) if text else ()
    eos = (one.truth.tokens[(start * 7) % 60],)
    results = [
        generate(engine, one.tokenizer, Request(one.prompt, n, kind, limit, stop, eos))
        for n, engine in ((1, Engine(one.target)), (budget, one.engine(seed=seed)))
    ]
    for field in ("tokens", "text", "finish", "token_sha256"):
        assert getattr(results[0], field) == getattr(results[1], field)
    assert results[0].tokens == one.truth.tokens[: len(results[0].tokens)]


@each_backend
def test_the_end_of_the_context_with_a_whole_tree_across_it(real, backend):
    one = real(backend)
    results = [
        generate(engine, one.tokenizer, Request(one.prompt, budget, max_tokens=500))
        for budget, engine in ((1, Engine(one.target)), (9, one.engine()))
    ]
    for result in results:
        assert result.finish == "context"
        assert len(result.tokens) == 80
    assert results[0].tokens == results[1].tokens


@each_backend
@pytest.mark.parametrize("when", ["prefill", "between rounds", "amid verify"])
def test_an_interrupt_leaves_the_engine_usable(real, backend, when, monkeypatch):
    one = real(backend)
    engine = one.engine()
    engine.prefill_chunk = 4
    request = Request(one.prompt, budget=6, max_tokens=30)
    calls = 0

    def interrupt_at(number, function):
        def wrapped(*arguments):
            nonlocal calls
            calls += 1
            if calls == number:
                raise KeyboardInterrupt
            return function(*arguments)

        return wrapped

    progress = None
    with monkeypatch.context() as patch:
        if when == "prefill":
            progress = interrupt_at(3, lambda done, total: None)
        elif when == "between rounds":
            patch.setattr(engine, "step", interrupt_at(3, engine.step))
        else:
            mlp = type(engine.target.layers[2].mlp)
            patch.setattr(mlp, "__call__", interrupt_at(5 * 4 + 4 + 3, mlp.__call__))
        result = generate(engine, one.tokenizer, request, on_progress=progress)
    assert result.finish == "interrupted"
    assert result.tokens == one.truth.tokens[: len(result.tokens)]
    assert (len(result.tokens) == 0) == (when == "prefill")
    assert len(result.experts) == 4
    again = generate(engine, one.tokenizer, request)
    assert again.finish == "length"
    # chunks of 4 instead of one pass: the reference's prefill is close, not equal
    if backend.name == "cpu":
        assert again.tokens == one.truth.tokens[:30]


@each_backend
def test_expert_counters_are_the_requests_own(real, backend):
    one = real(backend)
    request = Request(one.prompt, budget=1, max_tokens=5)
    engine = Engine(one.target)
    first, second = (generate(engine, one.tokenizer, request).experts for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert (a.layer, a.pinned) == (b.layer, b.pinned)
        assert a.hits + a.misses == b.hits + b.misses > 0
        assert a.pinned == (a.misses == 0 and a.bytes_read == 0)
