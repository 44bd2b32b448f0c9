"""UseCounter: counts how often committed rows used each expert, for a hot set to be saved."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from specdec.errors import RoutingLogError

if TYPE_CHECKING:
    from specdec.hot_set import HotSet
    from specdec.target.model import Target
    from specdec.target.passes import Pass

GATHERED_PASSES = 256


class UseCounter:
    """An observer of a target. What was chosen stays where it was computed until it is counted."""

    def __init__(self, target: "Target") -> None:
        store = target.experts.store
        self.model = store.checkpoint.folder.resolve().name
        self._uses = {layer: np.zeros(store.num_experts, np.int64) for layer in store.layers}
        self._gathered: list[tuple[dict[int, Any], slice | list[int]]] = []
        target.observers.append(self)

    def __call__(self, tokens: np.ndarray, this: "Pass", rows: slice | list[int]) -> None:
        self._gathered.append((dict(this.chosen), rows))
        if len(self._gathered) >= GATHERED_PASSES:
            self._count()

    def hot_set(self) -> "HotSet":
        """Everything counted so far."""
        from specdec.hot_set import HotSet

        self._count()
        return HotSet(self.model, {layer: uses.copy() for layer, uses in self._uses.items()})

    def _count(self) -> None:
        from specdec.kernels.array import to_numpy

        for chosen, rows in self._gathered:
            for layer, experts in chosen.items():
                np.add.at(self._uses[layer], to_numpy(experts)[rows].ravel(), 1)
        self._gathered = []


def check_writable(path: Path) -> None:
    """RoutingLogError where a file cannot be written, before the work that it is to hold."""
    from specdec.durable import DurableFile

    with DurableFile(path, RoutingLogError):
        pass
    if path.exists() and not path.is_file():
        raise RoutingLogError(f"{path}: exists and is not a file")
