"""Replay: the slots of one group of layers, asked and told as a log says, a million requests a
second with Numba (and the same code in plain Python without it, slowly).

`lru` does what target.expert_cache does with target.slots and the policy "lru", decision by
decision, without a byte read: the tests hold the two together. `optimal` evicts what is needed
again last (Belady), which no policy can know and none can beat.
"""

import heapq
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np

from specdec.target.admission import portion

Function = TypeVar("Function", bound=Callable[..., Any])


def _jit(function: Function) -> Function:
    """Compiled where Numba is installed."""
    try:
        from numba import njit
    except ImportError:
        return function
    return cast(Function, njit(function, cache=True))


_portion = _jit(portion)


@_jit
def _append(node: int, following: np.ndarray, before: np.ndarray) -> None:
    """Put a node at the recent end of the list; its end is the last entry of both arrays."""
    end = len(following) - 1
    last = before[end]
    following[last], before[node] = node, last
    following[node], before[end] = end, node


@_jit
def _remove(node: int, following: np.ndarray, before: np.ndarray) -> None:
    following[before[node]], before[following[node]] = following[node], before[node]


@_jit
def _room(layer, slots, held, quota, free_own):  # type: ignore[no-untyped-def]
    """Slots that could be had for a layer: empty ones, its own that are free to go, and what
    others hold beyond their quotas."""
    room = slots - held.sum() + free_own
    for other in range(len(held)):
        if other != layer:
            room += max(held[other] - quota[other], 0)
    return room


@_jit
def _reserve(layer, count, experts, slots, held, quota, full, live, following, before):  # type: ignore[no-untyped-def]
    """Take slots for `count` experts of a layer: empty ones, then the least recently used that
    may go. Returns how many of the layer's own went."""
    wanted = count - min(count, slots - held.sum())
    allowance = np.maximum(held - quota, 0)
    allowance[layer] = slots
    end, own = len(following) - 1, 0
    node = following[end]
    while wanted > 0:
        after, owner = following[node], node // experts
        if allowance[owner] > 0 and not live[node]:
            _remove(node, following, before)
            full[node] = False
            allowance[owner] -= 1
            held[owner] -= 1
            own += owner == layer
            wanted -= 1
        node = after
    held[layer] += count
    return own


@_jit
def lru(asks, starts, uses, use_starts, experts, slots, quota):  # type: ignore[no-untyped-def]
    """(hits, misses) int64 [layers] of the policy "lru".

    asks int64 [n, 3]: pass, layer of the group, expert, ascending; a pass asks a layer once.
    starts int64 [m + 1]: where each ask begins. uses [u, 3]: the same of committed rows, told
    after the pass; use_starts [passes + 1]: where each pass's begin. experts: of each layer.
    quota int64 [layers]: slots a layer cannot lose.
    """
    layers = len(quota)
    hits, misses = np.zeros(layers, np.int64), np.zeros(layers, np.int64)
    full, live = np.zeros(layers * experts, np.bool_), np.zeros(layers * experts, np.bool_)
    held = np.zeros(layers, np.int64)
    following = np.zeros(layers * experts + 1, np.int64)
    before = np.zeros(layers * experts + 1, np.int64)
    following[-1] = before[-1] = layers * experts
    missing = np.zeros(experts, np.int64)
    told = 0
    for ask in range(len(starts) - 1):
        first, last = starts[ask], starts[ask + 1]
        layer, now = asks[first, 1], asks[first, 0]
        while told < now:
            _tell(uses[use_starts[told] : use_starts[told + 1]], experts, full, following, before)
            told += 1
        many = 0
        for at in range(first, last):
            node = layer * experts + asks[at, 2]
            live[node] = full[node]
            if not full[node]:
                missing[many] = node
                many += 1
        misses[layer] += many
        hits[layer] += last - first - many
        free_own = held[layer] - (last - first - many)
        room = _room(layer, slots, held, quota, free_own)
        begun = _portion(many, room, last - first - many)
        _reserve(layer, begun, experts, slots, held, quota, full, live, following, before)
        for at in range(first, last):
            live[layer * experts + asks[at, 2]] = False
        filled = 0
        while filled < begun or begun < many:
            more = 0
            if begun < many:
                free_own = held[layer] - (begun - filled)
                room = _room(layer, slots, held, quota, free_own)
                more = _portion(many - begun, room, begun - filled)
                _reserve(layer, more, experts, slots, held, quota, full, live, following, before)
            for at in range(filled, begun):
                _append(missing[at], following, before)
                full[missing[at]] = True
            filled, begun = begun, begun + more
    return hits, misses


@_jit
def _tell(used, experts, full, following, before):  # type: ignore[no-untyped-def]
    for at in range(len(used)):
        node = used[at, 1] * experts + used[at, 2]
        if full[node]:
            _remove(node, following, before)
            _append(node, following, before)


@_jit
def optimal(asks, starts, experts, slots, layers):  # type: ignore[no-untyped-def]
    """(hits, misses) int64 [layers] when, after each asking, those stay that are needed again
    soonest; asks and starts as in `lru`.

    A bound, not a policy: the future is known, and quotas do not bind.
    """
    count = len(asks)
    following = np.full(count, count)
    latest = np.full(layers * experts, count)
    for at in range(count - 1, -1, -1):
        node = asks[at, 1] * experts + asks[at, 2]
        following[at] = latest[node]
        latest[node] = at
    hits, misses = np.zeros(layers, np.int64), np.zeros(layers, np.int64)
    until = np.full(layers * experts, -1)  # next use of what is held; -1: not held
    queue = [(np.int64(0), np.int64(0))]
    queue.pop()
    held = 0
    for ask in range(len(starts) - 1):
        for at in range(starts[ask], starts[ask + 1]):
            layer = asks[at, 1]
            node = layer * experts + asks[at, 2]
            if until[node] >= 0:
                hits[layer] += 1
            else:
                misses[layer] += 1
                held += 1
            until[node] = following[at]
            heapq.heappush(queue, (-following[at], node))
        while held > slots:
            farthest, node = heapq.heappop(queue)
            if until[node] == -farthest:  # else an older entry of what was asked for since
                until[node] = -1
                held -= 1
    return hits, misses
