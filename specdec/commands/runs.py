"""Runs: what `specdec generate` ran, with its text and a line that tells how it goes."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from specdec.commands.console import Console
from specdec.commands.live import LiveLine
from specdec.commands.watch import Watch
from specdec.errors import SpecdecError

if TYPE_CHECKING:
    from specdec.generation import Request, Result
    from specdec.load import Loaded
    from specdec.round import Round
    from specdec.writer import Piece


class Runs:
    """The runs of one command, each kept under its name, whole or not."""

    def __init__(self, loaded: "Loaded", console: Console) -> None:
        self.results: dict[str, Result] = {}
        self._loaded, self._console = loaded, console

    def make(self, name: str, request: "Request", watch: Watch | None) -> None:
        """Run a request and keep its result; KeyboardInterrupt and SpecdecError come after.

        watch: where the text goes; None to show none.
        """
        cache = self._loaded.engine.target.experts
        shown = watch is not None and watch.on_terminal
        live = LiveLine(self._console, cache, f"{name}:", request.max_tokens, shown)

        def both(piece: "Piece") -> None:
            if watch is not None:
                watch.text(piece)
            live.text()

        on_round = None if watch is None else watch.on_round
        try:
            self.results[name] = self.pass_by(name, request, both, on_round)
        except SpecdecError as error:
            if error.result is not None:
                self.results[name] = error.result
            raise
        finally:
            live.end()
        if self.results[name].finish == "interrupted":
            raise KeyboardInterrupt

    def pass_by(
        self,
        name: str,
        request: "Request",
        on_text: "Callable[[Piece], None] | None" = None,
        on_round: "Callable[[Round], None] | None" = None,
    ) -> "Result":
        """Run a request and keep nothing."""
        from specdec.generation import generate as run

        progress = self._console.progress(f"{name} prompt:")
        engine, tokenizer = self._loaded.engine, self._loaded.tokenizer
        return run(engine, tokenizer, request, on_text, progress, on_round)
