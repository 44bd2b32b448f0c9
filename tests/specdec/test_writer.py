"""Which token each part of a text came from, whatever holds the text back."""

import codecs
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.tokenizer import Detokenizer
from specdec.writer import Piece, Span, Writer

EOS = 256


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def token_bytes(self, token):
        return bytes([token])


def write(data, sizes=(1,), stops=(), limit=1000):
    """What comes of the tokens `data`, emitted in rounds of `sizes`, then flushed."""
    tokenizer: Any = Bytes()
    pieces: list[Piece] = []
    writer = Writer(Detokenizer(tokenizer), stops, (EOS,), limit, pieces.append)
    ended, at, number = writer.emit(data[:1]), 1, 0
    while ended is None and at < len(data):
        size = sizes[number % len(sizes)]
        ended = writer.emit(data[at : at + size])
        at, number = at + size, number + 1
    writer.flush()
    assert writer.text == "".join(piece.text for piece in pieces)
    return SimpleNamespace(ended=ended, pieces=pieces, tokens=writer.tokens, text=writer.text)


def spans(pieces):
    return [span for piece in pieces for span in piece.spans]


def test_a_rounds_last_token_is_the_bonus_and_so_is_the_first_of_all():
    done = write(b"abcdefgh", (3, 1))
    assert spans(done.pieces) == [
        Span(text, at, text in "bcfg") for at, text in enumerate("abcdefgh")
    ]


def test_plain_decoding_is_all_bonus():
    assert not any(span.accepted for span in spans(write(b"abcdefgh").pieces))


def test_a_character_belongs_to_the_token_that_completed_it():
    done = write("x€y".encode(), (2,))  # x | e2 82 | ac y
    assert spans(done.pieces) == [Span("x", 0, False), Span("€", 3, True), Span("y", 4, False)]
    half = write("x€".encode()[:3], (5,))
    assert spans(half.pieces)[-1] == Span("\ufffd", 2, False)


def test_text_held_back_keeps_its_tokens():
    """The scanner lets "STO" of three tokens go at once, with the first character that differs."""
    done = write(b"aSTOb", (2,), ("STOP",))
    assert [piece.text for piece in done.pieces] == ["a", "STOb"]
    assert done.pieces[1].spans == (
        Span("S", 1, True),
        Span("T", 2, False),
        Span("O", 3, True),
        Span("b", 4, False),
    )
    ended = write(b"abSTOPcd", (8,), ("STOP",))
    assert (ended.ended, ended.text) == ("stop", "ab")


def test_a_token_is_split_where_only_its_beginning_is_certain():
    words = {1: b"one ST", 2: b"ART"}
    tokenizer: Any = SimpleNamespace(token_bytes=words.get)
    pieces: list[Piece] = []
    writer = Writer(Detokenizer(tokenizer), ["STOP"], (), 9, pieces.append)
    writer.emit((1, 2))
    assert [piece.spans for piece in pieces] == [
        (Span("one ", 0, True),),
        (Span("ST", 0, True), Span("ART", 1, False)),
    ]


@given(
    text=st.text("ab€é\U0001f600", max_size=20),
    cut=st.integers(0, 3),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    stops=st.lists(st.text("ab€", min_size=1, max_size=4), max_size=2),
    limit=st.integers(1, 60),
)
def test_spans_are_the_text_character_by_character(text, cut, sizes, stops, limit):
    data = list(text.encode())
    data = [*data[: len(data) - cut], EOS]
    done = write(data, tuple(sizes), tuple(stops), limit)
    # By hand: round boundaries, then an incremental decoder that is asked after every token.
    accepted, at, number = {0: False}, 1, 0
    while at < len(data):
        size = sizes[number % len(sizes)]
        last = min(at + size, len(data)) - 1
        accepted |= {token: token < last for token in range(at, last + 1)}
        at, number = at + size, number + 1
    decoder, owners = codecs.getincrementaldecoder("utf-8")("replace"), []
    shown = [token for token in done.tokens if token != EOS]
    for token, byte in enumerate(shown):
        owners += [token] * len(decoder.decode(bytes([byte])))
    owners += [len(done.tokens) - 1] * len(decoder.decode(b"", final=True))
    found = [span for span in spans(done.pieces) for _ in span.text]
    assert len(found) == len(done.text)
    assert [span.token for span in found] == owners[: len(found)]
    assert all(span.accepted == accepted[span.token] for span in found)
    assert all(span.text for span in found)


@pytest.mark.parametrize("sizes", [(2,), (5,)])
def test_pieces_do_not_depend_on_the_rounds(sizes):
    data = "aaSTaSTO€".encode()
    texts = [[piece.text for piece in write(data, n, ("STOP",)).pieces] for n in ((1,), sizes)]
    assert texts[0] == texts[1]
