"""A round as lines of text."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from specdec.round import PhaseSeconds, Round
from specdec.round_drawing import draw, quoted
from specdec.tree.draft_tree import DraftTree
from tests.trees import trees


def make(tokens, parents, weights, path, bonus):
    tree = DraftTree(np.array(tokens, np.int32), np.array(parents, np.int32), np.log(weights))
    return Round(tree, path, bonus, PhaseSeconds())


def words(token):
    return {0: b" def", 1: b" main", 2: b"(", 3: b" run", 4: b"\n", 5: b"):", 6: b'"'}[token]


def test_a_tree_with_branches():
    one = make([0, 1, 3, 2, 4], [-1, 0, 0, 1, 1], [1, 0.912, 0.031, 0.5, 0.02], (0, 1), 5)
    assert [line.text for line in draw(one, 7, words)] == [
        "round 7: 4 drafted, 1 accepted",
        '" def"',
        '├─ " main"  0.912  accepted',
        '│  ├─ "("   0.500  rejected',
        '│  ├─ "\\n"  0.020  rejected',
        '│  └─ "):"         bonus',
        '└─ " run"   0.031  rejected',
    ]
    roles = ["root", "root", "accepted", "rejected", "rejected", "bonus", "rejected"]
    assert [line.role for line in draw(one, 7, words)] == roles


def test_plain_decoding():
    assert [line.text for line in draw(make([0], [-1], [1.0], (0,), 6), 1, words)] == [
        "round 1: 0 drafted, 0 accepted",
        '" def"',
        '└─ "\\""         bonus',
    ]


@given(trees(), st.data())
def test_every_node_has_its_line(parents, data):
    rows, path = len(parents), [0]
    while children := [row for row in range(rows) if parents[row] == path[-1]]:
        if data.draw(st.booleans()):
            break
        path.append(data.draw(st.sampled_from(children)))
    tokens = range(rows)
    one = make(tokens, parents, np.full(rows, 0.5), tuple(path), rows)
    lines = draw(one, 1, lambda token: f"<{token}>".encode())
    roles = {int(line.text.split("<")[1].split(">")[0]): line.role for line in lines[1:]}
    expected = {row: "accepted" if row in path else "rejected" for row in tokens}
    assert roles == expected | {0: "root", rows: "bonus"}
    # A node stands three columns to the right of its parent, the next line above that does.
    columns: list[tuple[int, int]] = []
    for line in lines[1:]:
        token, column = int(line.text.split("<")[1].split(">")[0]), line.text.index('"')
        above = next((t for t, c in reversed(columns) if c < column), -1)
        columns.append((token, column))
        assert above == (path[-1] if token == rows else parents[token])


def test_tokens_stay_on_one_line():
    assert quoted(b"a\tb\r\n") == '"a\\tb\\r\\n"'
    assert quoted("\u20ac\u2028".encode()) == '"€\\u2028"'
    assert quoted("\u20ac".encode()[:2]) == '"\\xe2\\x82"'
    assert quoted(b"\x1b[31m") == '"\\x1b[31m"'
    assert quoted(b"") == '""'
    assert quoted(b"\\n") == '"\\\\n"'
