"""Quotas: how many slots a layer cannot lose to others.

Layers are visited in turn, so one queue for all that is smaller than a pass forgets every expert
just before it is needed again. A layer therefore keeps what it has up to its quota: what a verify
pass is expected to need, as far as the slots reach. What is left is shared, and goes to whoever the
policy favours. With fewer slots than layers x top-k there is nothing to guarantee.

Protected layers, the first and the last few, get up to twice that, out of at most half of what is
shared: the others keep their own quota.
"""

from collections.abc import Collection, Sequence


def union(experts: int, top_k: int, rows: int) -> int:
    """Distinct experts of a layer that `rows` rows are expected to need; 2 x top_k at least.

    Of rows that choose top_k of E at random: E (1 - (1 - top_k / E)^rows); real rows agree more.
    """
    expected = experts * (1 - (1 - top_k / experts) ** rows)
    return min(experts, max(2 * top_k, round(expected)))


def protected_layers(protect: tuple[int, int], layers: Sequence[int]) -> frozenset[int]:
    """The first protect[0] and the last protect[1] of the layers (ascending)."""
    first, last = protect
    return frozenset(layers[:first]) | frozenset(layers[max(0, len(layers) - last) :])


def quotas(
    slots: int, layers: Sequence[int], wanted: int, top_k: int, protected: Collection[int]
) -> dict[int, int]:
    """Per layer of those that share `slots`, the slots it cannot lose to others.

    wanted: what a pass is expected to need of each layer. The sum is at most `slots`.
    """
    quota = min(wanted, slots // len(layers))
    if quota < top_k:
        return dict.fromkeys(layers, 0)
    favoured = [layer for layer in layers if layer in protected]
    shared = slots - quota * len(layers)
    extra = min(quota, shared // 2 // len(favoured)) if favoured else 0
    return {layer: quota + (extra if layer in protected else 0) for layer in layers}
