"""Seen: which tokens a text holds."""

from collections.abc import Sequence

import numpy as np


class Seen:
    """The distinct tokens of a growing text."""

    def __init__(self) -> None:
        self._known: set[int] = set()
        self._ids = np.empty(1024, np.int64)

    def add(self, tokens: Sequence[int]) -> None:
        """Tokens of the text from now on."""
        new = [token for token in dict.fromkeys(map(int, tokens)) if token not in self._known]
        count = len(self._known)
        while count + len(new) > len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
        self._ids[count : count + len(new)] = new
        self._known.update(new)

    def along(self, path: Sequence[int]) -> np.ndarray:
        """int [n]: the text's tokens and those of a path after it, some maybe twice."""
        return np.concatenate([self._ids[: len(self._known)], np.asarray(path, np.int64)])
