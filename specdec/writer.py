"""Writer: emitted tokens in, certain text out, and which token each part of the text came from.

Text is certain once its last character is whole and it can no longer be the beginning of a stop
string. A character belongs to the token that completed it.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from specdec.stops import StopScanner
from specdec.tokenizer import Detokenizer


class Span(NamedTuple):
    """Text that one token completed.

    token: its position among the emitted tokens. accepted: whether it was drafted and accepted;
    otherwise it is a bonus token, the target's own.
    """

    text: str
    token: int
    accepted: bool


class Piece(NamedTuple):
    """Text that became certain at once, in spans of at least one character."""

    spans: tuple[Span, ...]

    @property
    def text(self) -> str:
        """The spans joined."""
        return "".join(span.text for span in self.spans)


class Writer:
    """Turns tokens into text until something ends it."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str],
        eos_ids: Collection[int],
        limit: int,
        on_text: Callable[[Piece], None] | None,
    ) -> None:
        """limit: tokens after which the text ends. on_text gets the text as it becomes certain."""
        self.tokens: list[int] = []
        self.text = ""
        self._detokenizer = detokenizer
        self._stops = StopScanner(stops)
        self._eos, self._limit, self._on_text = set(eos_ids), limit, on_text
        self._uncertain: deque[Span] = deque()  # the text that the scanner has not let through
        self._accepted = False  # whether the last token was

    def emit(self, tokens: Sequence[int]) -> str | None:
        """Add a round's tokens one by one, the last of them its bonus token; why the text ended,
        or None if it goes on."""
        for left, token in zip(range(len(tokens) - 1, -1, -1), tokens, strict=True):
            self.tokens.append(token)
            self._accepted = left > 0
            if token in self._eos:
                return "eos"
            self._add(self._detokenizer.add(token))
            if self._stops.found:
                return "stop"
            if len(self.tokens) == self._limit:
                return "length"
        return None

    def flush(self) -> None:
        """Show what was held back: half characters, and beginnings of stop strings."""
        self._add(self._detokenizer.finish())
        self._show(self._stops.finish())

    def _add(self, text: str) -> None:
        """Text of the last token."""
        if text:
            self._uncertain.append(Span(text, len(self.tokens) - 1, self._accepted))
        self._show(self._stops.add(text))

    def _show(self, text: str) -> None:
        if not text:
            return
        self.text += text
        if self._on_text is not None:
            self._on_text(Piece(tuple(self._take(len(text)))))

    def _take(self, count: int) -> list[Span]:
        """The spans of the next `count` characters, in the order in which they came."""
        taken = []
        while count:
            span = self._uncertain.popleft()
            if len(span.text) > count:
                self._uncertain.appendleft(span._replace(text=span.text[count:]))
                span = span._replace(text=span.text[:count])
            count -= len(span.text)
            taken.append(span)
        return taken
