"""Streaming: the settings of how experts are read and kept. None of them changes a token."""

from dataclasses import dataclass

from specdec.target.policy import POLICIES

QUEUE_DEPTH = 8
PROTECT = (6, 3)
PREFETCH = ("auto", "off", "draft", "layer")


@dataclass(frozen=True)
class Streaming:
    """direct: reads go past the system's page cache.
    queue_depth: reads under way at most.
    policy: one of target.policy.POLICIES.
    protect: how many of the first and of the last layers get larger quotas (target/quotas.py).
    rows: of the largest verify pass, which quotas are made for.
    prefetch: one of PREFETCH, ways of reading ahead (target/prefetch.py). prefetch_bytes: the most
        that is read ahead in a pass; None for as much as passes miss.
    """

    direct: bool = False
    queue_depth: int = QUEUE_DEPTH
    policy: str = POLICIES[0]
    protect: tuple[int, int] = PROTECT
    rows: int = 1
    prefetch: str = PREFETCH[0]
    prefetch_bytes: int | None = None

    @property
    def io(self) -> str:
        """How reads go, in a word."""
        return "direct" if self.direct else "buffered"

    def __str__(self) -> str:
        first, last = self.protect
        return (
            f"{self.io} reads, {self.queue_depth} at a time; policy {self.policy}; "
            f"first {first} and last {last} layers protected; prefetch {self.prefetch}"
        )

    def __post_init__(self) -> None:
        assert self.queue_depth >= 1
        assert self.policy in POLICIES
        assert min(self.protect) >= 0
        assert self.rows >= 1
        assert self.prefetch in PREFETCH
        assert self.prefetch_bytes is None or self.prefetch_bytes > 0
