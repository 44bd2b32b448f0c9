"""LayerClock: where a forward pass spends its time, layer by layer.

MLX computes when somebody asks for the result, so every half of a layer is waited for while the
clock runs: passes that are timed are slower, most of all on a GPU.
"""

from dataclasses import dataclass
from time import perf_counter

from specdec.kernels.array import Array, evaluate


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer over all passes: in its mixer (attention or gated delta), and in its
    feed-forward, waiting for experts included."""

    layer: int
    kind: str
    mixer: float
    feed_forward: float


class LayerClock:
    """Adds up; the pass says where it is."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        """kinds: of the layers, as the config calls them."""
        self.kinds = kinds
        self.reset()

    def reset(self) -> None:
        self._mixer = [0.0] * len(self.kinds)
        self._feed_forward = [0.0] * len(self.kinds)

    def start(self, x: Array) -> None:
        """A layer begins with x [rows, hidden]."""
        evaluate(x)
        self._since = perf_counter()

    def mixed(self, layer: int, x: Array) -> None:
        """The layer's mixer gave x."""
        self._mixer[layer] += self._lap(x)

    def fed(self, layer: int, x: Array) -> None:
        """The layer's feed-forward gave x."""
        self._feed_forward[layer] += self._lap(x)

    def times(self) -> tuple[LayerTime, ...]:
        """Of every layer since the last reset."""
        halves = zip(self.kinds, self._mixer, self._feed_forward, strict=True)
        return tuple(LayerTime(i, *half) for i, half in enumerate(halves))

    def _lap(self, x: Array) -> float:
        evaluate(x)
        before, self._since = self._since, perf_counter()
        return self._since - before
