"""Switch: a choice of the process, which tests make for a while."""

from collections.abc import Iterator
from contextlib import contextmanager


class Switch:
    """on: None until it is decided."""

    on: bool | None = None

    @contextmanager
    def use(self, on: bool = True) -> Iterator[None]:
        """This way for a while."""
        before = self.on
        self.on = on
        try:
            yield
        finally:
            self.on = before
