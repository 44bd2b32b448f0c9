"""Instant: loading without reading, for replays: everything arrives at once."""

import numpy as np

from specdec.target.admission import Load
from specdec.target.slots import SlotTable


class Instant:
    """A Loader (target.admission) whose disk takes no time."""

    def __init__(self, table: SlotTable) -> None:
        self.table = table

    def begin(self, layer: int, experts: np.ndarray, live: np.ndarray) -> Load:
        return Load(layer, experts, slots=self.table.reserve(layer, experts, live))

    def finish(self, load: Load) -> None:
        self.table.fill(load.slots)

    def ahead(self, layer: int, experts: np.ndarray, live: np.ndarray, chance: float) -> None:
        self.table.fill(self.table.reserve(layer, experts, live, chance), early=True)

    def early(self) -> list[Load]:
        return []

    def hurry(self, load: Load) -> None:
        raise AssertionError("nothing is ever under way")

    def drop(self, load: Load) -> None:
        raise AssertionError("nothing is ever under way")
