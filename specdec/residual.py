"""The residual rule: accept a token drawn from q so that what is emitted follows p.

Recursive rejection sampling without replacement (Leviathan et al. 2023 for one candidate; Yang et
al. 2024 and Jeon et al. 2024 for several). Candidates x1, x2, ... are drawn from q one after the
other, each from what q has left. x1 is accepted with probability min(1, p(x1) / q(x1)); if it is
not, p becomes max(p - q, 0) and q loses x1, both normalized again, and x2 has its turn. After the
last the token is drawn from what p has become.

Each step emits exactly p if its candidate was drawn from exactly q and was tried whatever it is:
how many candidates there are must not depend on which ones were drawn.
"""

import numpy as np

from specdec.distribution import Distribution


def accept(
    p: Distribution, tokens: np.ndarray, q: np.ndarray, chances: np.ndarray, last: float
) -> tuple[int, int | None]:
    """The emitted token, and which candidate it is; None where no candidate was accepted.

    tokens: int [n], all that q holds, in the order drawn; the first len(chances) are tried.
    q: float64 [n], their probabilities, all above 0.
    chances: float64 [tries], a uniform number in (0, 1) for each candidate; last: another, for the
        draw from what p has become.
    """
    if len(chances) == 0:
        return p.draw(last), None
    inside = p.probabilities(tokens)  # what is left of p where q is, and (below) where it is not
    others, outside = None, 0.0
    for at, chance in enumerate(chances):
        left = q[at:] / q[at:].sum()
        if chance * left[0] < inside[at]:
            return int(tokens[at]), at
        if at == 0:  # only now, for it costs a pass over the vocabulary
            others = p.without(tokens)
            outside = others.weights.sum() / p.weights.sum() if others is not None else 0.0
        inside[at:] = np.maximum(inside[at:] - left, 0.0)
        total = inside.sum() + outside
        if total <= 0.0:  # p is q but for rounding, which alone rejected this one
            return int(tokens[at]), at
        inside, outside = inside / total, outside / total
    if others is not None and last < outside:
        return others.draw(last / outside), None
    rest = min((last - outside) / (1.0 - outside), 1.0 - 2.0**-53)
    return int(tokens[Distribution(None, inside).draw(rest)]), None
