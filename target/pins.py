"""Pins and slots: which layers keep all their experts resident, and how layers share the slots."""

from collections.abc import Sequence

from specdec.errors import PlanError


def pinned_layers(count: int, layers: Sequence[int]) -> tuple[int, ...]:
    """The `count` layers to pin out of the MoE layers (ascending): first, last, then from the top.

    20 of 24 pins 0-18 and 23. The order never takes a pin back when the count grows. PlanError when
    the count is negative or above the number of layers.
    """
    if not 0 <= count <= len(layers):
        raise PlanError(
            f"--pin-layers {count} is out of range: the model has {len(layers)} layers with experts"
        )
    order = [*layers[:1], *layers[1:][-1:], *layers[1:-1]]
    return tuple(sorted(order[:count]))


def share_slots(slots: int, experts: Sequence[int]) -> tuple[int, ...]:
    """Split `slots` among groups of layers that cannot share: in proportion, at least one each.

    experts: the number of experts of each group, an upper bound of its share. A largest-remainder
    split. PlanError when there are fewer slots than groups.
    """
    if slots < len(experts):
        raise PlanError(
            f"--cache-slots {slots}: the unpinned layers have {len(experts)} different expert "
            "shapes, which need at least one slot each"
        )
    slots, total = min(slots, sum(experts)), sum(experts)
    quotas = [slots * count / total for count in experts]
    shares = [max(1, int(quota)) for quota in quotas]
    while sum(shares) != slots:
        step = 1 if sum(shares) < slots else -1
        movable = [
            group
            for group, share in enumerate(shares)
            if (share < experts[group] if step > 0 else share > 1)
        ]
        # The group furthest from its quota moves; the first one of equals.
        group = max(movable, key=lambda group: step * (quotas[group] - shares[group]))
        shares[group] += step
    return tuple(shares)
