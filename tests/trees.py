"""Random trees and blocks, for tests and as hypothesis strategies."""

import numpy as np
from hypothesis import strategies as st

from specdec.tree.block import Block


def random_parents(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Parents int32 [rows] of a tree in any valid order: chains, bushes and all between."""
    reach = int(rng.integers(1, rows + 1))  # how far back a parent may stand
    parents = [-1, *(int(rng.integers(max(0, row - reach), row)) for row in range(1, rows))]
    return np.array(parents, np.int32)


def path_to(parents: np.ndarray, row: int) -> list[int]:
    """Rows from the root to `row`."""
    path = [row]
    while parents[path[-1]] >= 0:
        path.append(int(parents[path[-1]]))
    return path[::-1]


@st.composite
def trees(draw: st.DrawFn, most: int = 25) -> np.ndarray:
    """Parents of a tree of 1 to `most` rows: a row's parent is any row above it."""
    rows = draw(st.integers(1, most))
    kind = draw(st.sampled_from(["chain", "star", "any"]))
    if kind == "chain":
        return np.arange(-1, rows - 1, dtype=np.int32)
    if kind == "star":
        return np.array([-1, *[0] * (rows - 1)], np.int32)
    return np.array([-1, *(draw(st.integers(0, row - 1)) for row in range(1, rows))], np.int32)


@st.composite
def blocks(draw: st.DrawFn, max_slots: int = 4, max_width: int = 4) -> Block:
    """Blocks with many ties: log-probabilities from a coarse grid, zero and -inf included."""
    slots = draw(st.integers(1, max_slots))
    width = draw(st.integers(1, max_width))
    grid = st.sampled_from([0.0, -0.1, -0.1, -0.3, -0.7, -2.0, -2.5, -30.0, -np.inf])
    fine = st.floats(-5, 0)
    rows = draw(
        st.lists(
            st.lists(st.one_of(grid, fine), min_size=width, max_size=width),
            min_size=slots,
            max_size=slots,
        )
    )
    log_probs = -np.sort(-np.array(rows, np.float64), axis=1)
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    tokens = np.stack([rng.permutation(50)[:width] for _ in range(slots)]).astype(np.int32)
    return Block(tokens, log_probs)
