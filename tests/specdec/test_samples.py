"""Rounds drawn for the page: where the boxes of a tree lie."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from specdec.reports.samples import GAP, ROW, drawing
from specdec.round import PhaseSeconds, Round
from specdec.tree.draft_tree import DraftTree
from tests.trees import path_to, trees


@given(trees(), st.data())
def test_every_node_has_a_place_of_its_own(parents, data):
    rows = len(parents)
    path = path_to(parents, data.draw(st.integers(0, rows - 1)))
    tree = DraftTree(np.arange(rows, dtype=np.int32), parents, np.zeros(rows))
    one = Round(tree, tuple(path), rows, PhaseSeconds())
    found = drawing(one, "round 1", {str(row): f"<{row}>" for row in range(rows + 1)})
    boxes = {int(box.text[1:-1]): box for box in found.boxes}
    assert sorted(boxes) == list(range(rows + 1))
    # What is emitted stands on one line; nobody stands on anybody else.
    assert {boxes[row].y for row in (*path, rows)} == {ROW / 2}
    assert len({(box.x, box.y) for box in boxes.values()}) == rows + 1
    for row, above in [*enumerate(parents.tolist()), (rows, path[-1])]:
        box = boxes[row]
        accepted = row in path
        role = "bonus" if row == rows else "accepted" if accepted else "rejected"
        assert box.role == (role if row else "root")
        assert 0 < box.y < found.height
        assert box.x + box.width <= found.width
        if row:
            upper = boxes[above]
            assert box.x >= upper.x + upper.width + GAP - 1e-9
            assert box.y >= upper.y
            start = f"M{upper.x + upper.width:.0f} {upper.y:.0f}H"
            assert box.link.startswith(start)
            assert box.link.endswith(f"V{box.y:.0f}H{box.x:.0f}")
        else:
            assert box.link == ""
