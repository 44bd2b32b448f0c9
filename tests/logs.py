"""Routing logs made by hand or by chance."""

import numpy as np

from specdec.routing_log import COMMITTED, PROMPT, RoutingHeader, RoutingLog


def header(layers, experts, top_k, pinned=(), slots=0, kinds=None, **fields):
    return RoutingHeader(
        model="random",
        layers=tuple(range(layers)),
        experts=experts,
        top_k=top_k,
        disk_bytes=tuple(1000 + layer for layer in range(layers)),
        resident_bytes=(2000,) * layers,
        kinds=tuple(kinds or (0,) * layers),
        fixed_bytes=fields.get("fixed_bytes", 10_000),
        pinned=tuple(pinned),
        slots=slots,
        policy="lru",
        protect=fields.get("protect", (6, 3)),
        rows=fields.get("rows", 1),
        tolerance=0.0,
    )


def log_of(head, random, passes, rows, prompt=0, choose=None):
    """A prompt of `prompt` rows, if any, then passes of up to `rows` rows, some of them committed.

    choose: shape [rows, layers, top_k] -> experts; by chance without.
    """

    def by_chance(shape):
        order = random.random((*shape[:2], head.experts)).argsort(axis=-1)
        return order[..., : shape[2]]

    parts = []
    for at in range(passes + bool(prompt)):
        first = prompt and at == 0
        count = prompt if first else int(random.integers(1, rows + 1))
        part = np.zeros(count, head.record)
        part["pass"] = at
        part["experts"] = (choose or by_chance)((count, len(head.layers), head.top_k))
        keep = count if first else int(random.integers(1, count + 1))
        part["flags"][:keep] = COMMITTED
        part["flags"] |= PROMPT if first else 0
        parts.append(part)
    return RoutingLog(head, np.concatenate(parts))


def write_log(path, log):
    path.write_bytes(log.header.encode() + log.rows.tobytes())
