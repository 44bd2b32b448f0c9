"""Stop strings in text that arrives in pieces of any size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.stops import StopScanner

few_letters = st.text("ab\u00e9", max_size=30)
stop_strings = st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3)


def shown(stops, pieces):
    """What a scanner shows piece by piece, and whether it found a stop string."""
    scanner = StopScanner(stops)
    out = [scanner.add(piece) for piece in pieces]
    return [*out, scanner.finish()], scanner.found


@given(few_letters, stop_strings)
def test_text_ends_where_the_first_stop_string_is_complete(text, stops):
    """Letter by letter, against a search after every letter."""
    for end in range(len(text) + 1):
        found = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if found:
            pieces, was_found = shown(stops, text)
            assert was_found
            assert "".join(pieces) == text[: min(found)]
            return
    pieces, was_found = shown(stops, text)
    assert "".join(pieces) == text
    assert not was_found


@given(few_letters, st.text("ab\u00e9", min_size=1, max_size=4), st.data())
def test_one_stop_string_ends_the_text_at_its_first_place_however_it_is_split(text, stop, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    out, found = shown([stop], pieces)
    assert found == (stop in text)
    assert "".join(out) == text.split(stop)[0]


@given(few_letters, stop_strings)
def test_only_what_may_become_a_stop_string_is_held_back(text, stops):
    scanner, out = StopScanner(stops), ""
    for end, letter in enumerate(text, 1):
        out += scanner.add(letter)
        if scanner.found:
            return
        assert text.startswith(out)
        beginnings = [stop[:n] for stop in stops for n in range(len(stop))]
        open_ones = [start for start in beginnings if text[:end].endswith(start)]
        assert end - len(out) == max(map(len, open_ones), default=0)


def test_nothing_is_shown_after_the_end():
    scanner = StopScanner(["stop"])
    assert [scanner.add(piece) for piece in ("one s", "to", "p two", "three")] == [
        "one ",
        "",
        "",
        "",
    ]
    assert scanner.found
    assert scanner.finish() == ""


def test_the_earliest_of_several_in_one_piece_counts():
    assert shown(["two", "ne t"], ["one two"]) == (["o", ""], True)


def test_a_beginning_that_comes_to_nothing_is_shown():
    assert shown(["aab"], ["a", "a", "a", "c"]) == (["", "", "a", "aac", ""], False)
    assert shown(["ab"], ["xa"]) == (["x", "a"], False)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(AssertionError):
        StopScanner(["a", ""])
