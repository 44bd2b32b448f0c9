"""What cache-aware routing changed in a run, as specdec.metrics reports it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specdec.ratio import ratio

if TYPE_CHECKING:
    from specdec.target.tolerance import LayerSubstitutions


@dataclass(frozen=True)
class SubstitutionMetrics:
    """What cache-aware routing changed in a run, rejected rows and the prompt included.

    choices: experts that routing chose, top-k per row and unpinned layer. substituted: those that
        gave way to another expert, which was in memory. rate: substituted / choices.
    per_token: substituted / generated tokens.
    kl: mean over rows and unpinned layers, in nats, of ln(router's probability of the exact top-k /
        of the experts taken); 0 where nothing was substituted.
    """

    choices: int
    substituted: int
    rate: float | None
    per_token: float | None
    kl: float | None


def substitutions(
    counts: "Sequence[LayerSubstitutions] | None", tokens: int
) -> SubstitutionMetrics | None:
    """The figures of a run that generated `tokens`; None where routing was exact."""
    if counts is None:
        return None
    choices = sum(one.choices for one in counts)
    substituted = sum(one.substituted for one in counts)
    return SubstitutionMetrics(
        choices=choices,
        substituted=substituted,
        rate=ratio(substituted, choices),
        per_token=ratio(substituted, tokens),
        kl=ratio(sum(one.kl for one in counts), sum(one.rows for one in counts)),
    )
