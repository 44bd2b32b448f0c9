"""A round drawn as text: its tree with tokens and path weights, what was accepted, the bonus token.

round 2: 4 drafted, 2 accepted
" def"
├─ " main"      0.912  accepted
│  ├─ "("       0.871  accepted
│  │  └─ "):"          bonus
│  └─ "_"       0.020  rejected
└─ " run"       0.031  rejected
"""

from collections.abc import Callable
from math import exp
from typing import NamedTuple

from specdec.round import Round

ROOT, ACCEPTED, REJECTED, BONUS = "root", "accepted", "rejected", "bonus"


class Line(NamedTuple):
    """One line of a drawing. role: ROOT (the heading too), ACCEPTED, REJECTED or BONUS."""

    text: str
    role: str


class _Node(NamedTuple):
    """label: the token behind its branch. weight: probability of the path in the draft's eyes."""

    label: str
    weight: str
    role: str


def draw(one: Round, number: int, token_bytes: Callable[[int], bytes]) -> list[Line]:
    """The lines of a round, the `number`-th of its run; token_bytes tells what a token stands for.

    Siblings stand in the order in which they entered the tree, the bonus token below the last
    accepted node, after what was rejected there.
    """
    tree, accepted = one.tree, set(one.path)
    children: list[list[int]] = [[] for _ in range(tree.rows)]
    for row in range(1, tree.rows):
        children[tree.parents[row]].append(row)
    nodes: list[_Node] = []

    def add(row: int, stem: str) -> None:
        """What stands below `row`, whose own branch ends in `stem`."""
        last = one.path[-1] == row  # then the bonus token follows
        for at, child in enumerate(children[row]):
            end = at == len(children[row]) - 1 and not last
            label = f"{stem}{'└─' if end else '├─'} {quoted(token_bytes(int(tree.tokens[child])))}"
            role = ACCEPTED if child in accepted else REJECTED
            nodes.append(_Node(label, f"{exp(tree.log_weights[child]):.3f}", role))
            add(child, stem + ("   " if end else "│  "))
        if last:
            nodes.append(_Node(f"{stem}└─ {quoted(token_bytes(one.bonus))}", "", BONUS))

    add(0, "")
    width = max(len(node.label) for node in nodes)
    return [
        Line(f"round {number}: {tree.rows - 1} drafted, {one.accepted} accepted", ROOT),
        Line(quoted(token_bytes(int(tree.tokens[0]))), ROOT),
        *(Line(f"{n.label:<{width}}  {n.weight:>5}  {n.role}", n.role) for n in nodes),
    ]


def quoted(data: bytes) -> str:
    """A token in quotation marks on one line: control characters and half characters escaped."""
    return '"' + "".join(map(_shown, data.decode(errors="surrogateescape"))) + '"'


def _shown(one: str) -> str:
    if one in '"\\':
        return "\\" + one
    if "\udc80" <= one <= "\udcff":  # a byte that is no character by itself
        return f"\\x{ord(one) - 0xDC00:02x}"
    return one if one.isprintable() else one.encode("unicode_escape").decode()
