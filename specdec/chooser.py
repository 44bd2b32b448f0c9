"""Which chooser a request's sampling asks for."""

from specdec.choose import Greedy
from specdec.matching import Matching
from specdec.sampling import Sampling
from specdec.swor import Swor


def chooser(sampling: Sampling) -> Greedy:
    """A chooser for one request, before its first token."""
    if sampling.greedy:
        return Greedy()
    return Swor(sampling) if sampling.accept == "swor" else Matching(sampling)
