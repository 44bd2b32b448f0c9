"""What the engine hands to those who count and print: one Prefill, then Rounds."""

from dataclasses import dataclass, fields
from time import perf_counter

from specdec.tree.draft_tree import DraftTree


@dataclass(frozen=True)
class Prefill:
    """The prompt's pass.

    token: the first emitted token, already a bonus token; None when the pass was interrupted.
    """

    token: int | None
    prompt_tokens: int
    seconds: float


@dataclass(frozen=True)
class PhaseSeconds:
    """Wall time of one round's phases, in seconds. What is begun of the next round while this one
    is not committed yet counts as drafting, its verify pass as verifying."""

    draft: float = 0.0
    build: float = 0.0
    verify: float = 0.0
    commit: float = 0.0

    @property
    def drafting(self) -> float:
        """Until there is a tree."""
        return self.draft + self.build

    @property
    def passing(self) -> float:
        """From a tree to its path, committed."""
        return self.verify + self.commit


class PhaseClock:
    """Counts the wall time of a round to its phases, from when it is made."""

    def __init__(self) -> None:
        self._seconds = {phase.name: 0.0 for phase in fields(PhaseSeconds)}
        self._since = perf_counter()

    def lap(self, phase: str) -> None:
        """The time since the last lap was spent on this one of PhaseSeconds."""
        now = perf_counter()
        self._seconds[phase] += now - self._since
        self._since = now

    @property
    def seconds(self) -> PhaseSeconds:
        return PhaseSeconds(**self._seconds)


@dataclass(frozen=True)
class Round:
    """One round of draft, build, verify, commit.

    tree: the verified tree (the root alone when the budget is 1).
    path: accepted rows, the root first; len(path) - 1 draft tokens were accepted.
    bonus: the target's own next token after the path, the root of the next round.
    budget: the most nodes that were to be drafted; 1 where no draft was asked.
    context: committed tokens before the round.
    told: committed tokens that the draft was told of in this round's draft phase.
    misses, stall: experts that were not in memory when asked for, and seconds waited for them.
    experts: all that layers which are not pinned asked for, each once per layer.
    begun_before, begins_next: of a round of plain decoding, whether the round before it gave its
        pass to the GPU, and whether it gave it the next round's.
    """

    tree: DraftTree
    path: tuple[int, ...]
    bonus: int
    seconds: PhaseSeconds
    budget: int = 1
    context: int = 0
    told: int = 0
    misses: int = 0
    stall: float = 0.0
    experts: int = 0
    begun_before: bool = False
    begins_next: bool = False

    def __post_init__(self) -> None:
        assert self.path[0] == 0

    @property
    def accepted(self) -> int:
        """Accepted draft tokens."""
        return len(self.path) - 1

    @property
    def by_itself(self) -> bool:
        """Whether its pass, and no other, was begun and read in it."""
        return not (self.begun_before or self.begins_next)

    @property
    def among_others(self) -> bool:
        """Whether it is one of rounds of plain decoding that begin each other's passes."""
        return self.begun_before and self.begins_next

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens this round emits: the accepted draft tokens, then the bonus token."""
        return (*(int(self.tree.tokens[row]) for row in self.path[1:]), self.bonus)
