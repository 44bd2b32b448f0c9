"""Diagnosis: what the doctor measured, and what it says about it."""

from dataclasses import dataclass

MINIMUM = 0.5  # first-slot agreement of a pair that fits
CLEARLY = 0.15  # by how much a change must raise it before it is named: 3 errors of 200 positions


@dataclass(frozen=True)
class Agreement:
    """How often the draft's top token of a slot was the target's own token there."""

    hits: int
    positions: int

    def __post_init__(self) -> None:
        assert 0 <= self.hits <= self.positions

    @property
    def share(self) -> float:
        """From 0 to 1; 0 where nothing could be compared."""
        return self.hits / self.positions if self.positions else 0.0

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} % ({self.hits} of {self.positions})"


@dataclass(frozen=True)
class Trial:
    """First-slot agreement with one thing changed.

    change: what was changed; meaning: what is wrong if that helps.
    """

    change: str
    meaning: str
    agreement: Agreement


@dataclass(frozen=True)
class Diagnosis:
    """Agreement per slot, the first slot first; without trials where the pair fits."""

    tokens: int
    slots: tuple[Agreement, ...]
    trials: tuple[Trial, ...] = ()

    def __post_init__(self) -> None:
        assert self.slots

    @property
    def first_slot(self) -> float:
        return self.slots[0].share

    @property
    def fits(self) -> bool:
        return self.first_slot >= MINIMUM

    @property
    def culprit(self) -> Trial | None:
        """The change that helps most, if one clearly helps."""
        best = max(self.trials, key=lambda trial: trial.agreement.share, default=None)
        if best is None or best.agreement.share < self.first_slot + CLEARLY:
            return None
        return best

    def lines(self) -> list[str]:
        """The findings in words, a line each."""
        lines = [
            f"The target read a text of {self.tokens} tokens. After each of the last "
            f"{self.slots[0].positions} the draft's first choice is compared with the target's own "
            "next token,",
            "in later slots where the text up to there is what the target itself would have said.",
        ]
        lines += [
            f"  slot {slot}: {agreement}"
            for slot, agreement in enumerate(self.slots, 1)
            if agreement.positions
        ]
        verdict = "The pair fits" if self.fits else "Too low"
        lines.append(
            f"{verdict}: first-slot agreement {100 * self.first_slot:.1f} %, "
            f"expected at least {100 * MINIMUM:.0f} %."
        )
        if not self.fits:
            lines.append("The output stays right with such a draft, but little of it is accepted.")
        if self.trials:
            lines.append("First slot with one thing changed:")
            lines += [f"  {trial.change}: {trial.agreement}" for trial in self.trials]
        if self.culprit is not None:
            lines.append(f"Most likely: {self.culprit.meaning}.")
        elif not self.fits:
            lines.append(
                "None of these explains it. What is left: the draft was trained for another target "
                "or another revision of it; the target is quantized far below what the draft was "
                "trained on; the draft's weights are damaged or were converted wrongly; or it "
                "has not been trained enough."
            )
        return lines
