"""Sampling: the settings that say how the next token is taken from the target's logits.

A leaf without NumPy or MLX: the command line reads it for its help. What the settings do stands in
processors.py, who takes the tokens in choose.py.
"""

import math
from dataclasses import dataclass

ACCEPTS = ("match", "swor")
MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the default is greedy.

    temperature: 0 takes the most probable token; above, logits are divided by it.
    top_p: keep the most probable tokens that together hold this share; 1 keeps all.
    top_k: keep this many of the most probable tokens; 0 keeps all.
    min_p: keep tokens at least this share as probable as the most probable one; 0 keeps all.
    repetition_penalty: logits of tokens that the text holds already, prompt included, are divided
        by it (multiplied if negative); 1 changes nothing.
    seed: of the counter-based random numbers, one per position of the text.
    accept: "match": the target draws its token after each row, and drafted tokens are accepted as
        far as they are those; the text is that of budget 1. "swor": drafted tokens are drawn
        without replacement and accepted by the residual rule; the text follows the same
        distribution, but is another one for every budget.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    accept: str = "match"

    def __post_init__(self) -> None:
        assert 0.0 <= self.temperature < math.inf
        assert 0.0 < self.top_p <= 1.0
        assert self.top_k >= 0
        assert 0.0 <= self.min_p <= 1.0
        assert 0.0 < self.repetition_penalty < math.inf
        assert 0 <= self.seed <= MAX_SEED
        assert self.accept in ACCEPTS
        assert self.accept == "match" or self.temperature > 0.0

    @property
    def greedy(self) -> bool:
        """Whether tokens are the most probable ones of the logits as they are."""
        return self.temperature == 0.0 and self.repetition_penalty == 1.0

    @property
    def same_for_every_budget(self) -> bool:
        """Whether the emitted tokens are those of plain decoding."""
        return self.accept == "match"

    def __str__(self) -> str:
        """In words, what is at its default left out: "temperature 0.8, top-p 0.95, seed 1"."""
        penalty = f"repetition penalty {self.repetition_penalty:g}"
        if self.temperature == 0.0:
            return "greedy" if self.repetition_penalty == 1.0 else f"greedy, {penalty}"
        parts = [f"temperature {self.temperature:g}"]
        parts += [f"top-p {self.top_p:g}"] if self.top_p < 1.0 else []
        parts += [f"top-k {self.top_k}"] if self.top_k else []
        parts += [f"min-p {self.min_p:g}"] if self.min_p else []
        parts += [penalty] if self.repetition_penalty != 1.0 else []
        parts.append(f"seed {self.seed}")
        parts += ["accepted without replacement (swor)"] if self.accept == "swor" else []
        return ", ".join(parts)


GREEDY = Sampling()
