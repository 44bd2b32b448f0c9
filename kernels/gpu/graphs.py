"""Graphs: functions of arrays compiled by MLX, the latest used of each kind kept."""

from collections.abc import Callable
from typing import Any, TypeAlias

import mlx.core as mx

GRAPHS = 128  # kept: each holds the text of every kernel that it launches

# containers of arrays in, containers of arrays out
Traced: TypeAlias = Callable[..., Any]


class Graphs:
    """Kinds, and what the first call of each was compiled to."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Traced] = {}

    @property
    def kinds(self) -> list[tuple[Any, ...]]:
        """The latest used at the end."""
        return list(self._kept)

    def of(self, kind: tuple[Any, ...], body: Traced) -> Traced:
        """`body` compiled, or what was compiled for the kind before.

        The kind must tell the shapes apart: MLX would keep what it compiled for all of them.
        """
        graph = self._kept.pop(kind, None) or mx.compile(body)
        self._kept[kind] = graph
        if len(self._kept) > GRAPHS:
            del self._kept[next(iter(self._kept))]
        return graph

    def clear(self) -> None:
        self._kept.clear()
