"""Attention of trees and prompts against softmax in float64, and rows against decoding.

The bitwise tests run a row of a tree, and the same tokens one at a time with every earlier key
where decoding would have put it: at its position.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kernels.attention import AttentionLayout, prefill_attention, tree_attention
from specdec.kernels.layout import TreeLayout
from tests.backends import Operations, each_backend, each_exact_backend, same_bits
from tests.kernels.weights import normal
from tests.trees import path_to, random_parents, trees

Three = tuple[np.ndarray, np.ndarray, np.ndarray]
LENGTHS = [0, 1, 5, 63, 64, 65, 127, 128, 129, 200]
# around whole blocks of the reference, and anywhere
lengths = st.one_of(
    st.sampled_from([0, 1, 62, 63, 64, 65, 126, 127, 128, 129, 191, 192]), st.integers(0, 200)
)


def attention64(queries, keys, values, seen, scale):
    """One softmax per head and row over the keys at `seen[row]`."""
    heads, rows, _ = queries.shape
    group = heads // keys.shape[0]
    out = np.empty(queries.shape)
    for head, row in np.ndindex(heads, rows):
        k = keys[head // group, seen[row]].astype(np.float64)
        scores = k @ queries[head, row].astype(np.float64) * scale
        weights = np.exp(scores - scores.max())
        out[head, row] = weights / weights.sum() @ values[head // group, seen[row]]
    return out


def case(rng, heads, kv_heads, dim, length, rows, spare=0) -> Three:
    """Queries, keys, values; the buffers end in `spare` places full of NaN nobody may read."""
    queries = normal(rng, heads, rows, dim)
    keys, values = (normal(rng, kv_heads, length + rows + spare, dim) for _ in range(2))
    keys[:, length + rows :] = values[:, length + rows :] = np.nan
    return queries, keys, values


def attend(backend, queries, keys, values, parents, length, scale):
    layout = AttentionLayout(TreeLayout(parents), length)
    y = Operations(backend)(tree_attention, queries, keys, values, layout, scale)
    return by_head(y, queries)


def by_head(y, queries):
    """[rows, heads * dim] as [heads, rows, dim]."""
    return np.ascontiguousarray(y.reshape(queries.shape[1], len(queries), -1).swapaxes(0, 1))


@each_backend
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (6, 2), (8, 1), (3, 3)])
@pytest.mark.parametrize("dim", [32, 64, 80, 128, 256])
def test_heads_and_dimensions(backend, heads, kv_heads, dim):
    rng = np.random.default_rng(dim + heads)
    parents = np.array([-1, 0, 0, 1, 1, 2, 5], np.int32)
    arrays = case(rng, heads, kv_heads, dim, 70, len(parents))
    seen = [[*range(70), *(70 + r for r in path_to(parents, row))] for row in range(len(parents))]
    expected = attention64(*arrays, seen, dim**-0.5)
    y = attend(backend, *arrays, parents, 70, dim**-0.5)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, atol=2e-6)


@each_backend
@pytest.mark.parametrize("length", LENGTHS)
def test_trees_after_any_number_of_committed_tokens(backend, length):
    rng = np.random.default_rng(length)
    for rows in (1, 2, 25, 70):
        parents = random_parents(rng, rows)
        # sharp, so that the right keys matter
        arrays = case(rng, 4, 2, 32, length, rows, spare=3)
        paths = [path_to(parents, row) for row in range(rows)]
        seen = [[*range(length), *(length + r for r in path)] for path in paths]
        y = attend(backend, *arrays, parents, length, 0.7)
        np.testing.assert_allclose(y, attention64(*arrays, seen, 0.7), atol=5e-6)


@each_backend
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("rows", [1, 7, 65, 130])
def test_prompt_chunks(backend, length, rows):
    rng = np.random.default_rng(length + rows)
    arrays = case(rng, 4, 2, 32, length, rows, spare=2)
    y = by_head(Operations(backend)(prefill_attention, *arrays, length, 0.5), arrays[0])
    seen = [range(length + row + 1) for row in range(rows)]
    np.testing.assert_allclose(y, attention64(*arrays, seen, 0.5), atol=5e-6)


@each_backend
def test_scores_far_from_zero_do_not_overflow(backend):
    rng = np.random.default_rng(0)
    queries, keys, values = case(rng, 2, 1, 32, 70, 3)
    parents = np.array([-1, 0, 0], np.int32)
    seen = [[*range(70), *(70 + r for r in path_to(parents, row))] for row in range(3)]
    for scale in (30.0, -30.0):
        y = attend(backend, queries, keys, values, parents, 70, scale)
        expected = attention64(queries, keys, values, seen, scale)
        np.testing.assert_allclose(y, expected, atol=1e-3)


@each_backend
@pytest.mark.parametrize("where", ["committed", "ancestor"])
def test_a_nan_key_reaches_the_rows_that_see_it_and_no_other(backend, where):
    rng = np.random.default_rng(1)
    queries, keys, values = case(rng, 2, 2, 32, 66, 5)
    parents = np.array([-1, 0, 0, 1, 2], np.int32)
    keys[:, 3 if where == "committed" else 66 + 1, 5] = np.nan
    y = attend(backend, queries, keys, values, parents, 66, 0.2)
    finite = np.isfinite(y).all(axis=(0, 2))
    assert finite.tolist() == ([False] * 5 if where == "committed" else [1, 0, 1, 0, 1])


@each_exact_backend
@given(
    seed=st.integers(0, 2**32 - 1),
    parents=trees(),
    length=lengths,
    heads=st.sampled_from([(2, 1), (4, 2), (3, 3), (6, 2)]),
    dim=st.sampled_from([32, 48, 64, 128, 256]),
)
@settings(max_examples=25, deadline=None)
def test_a_tree_row_has_the_bits_of_decoding_its_path(backend, seed, parents, length, heads, dim):
    rng = np.random.default_rng(seed)
    rows = len(parents)
    queries, keys, values = case(rng, heads[0], heads[1], dim, length, rows, spare=1)
    scale = dim**-0.5
    y = attend(backend, queries, keys, values, parents, length, scale)
    root = np.array([-1], np.int32)
    for row in {0, rows - 1, int(rng.integers(rows))}:
        path = path_to(parents, row)
        for done in {len(path) - 1, int(rng.integers(len(path)))}:
            places = [*range(length), *(length + r for r in path[: done + 1])]
            one = queries[:, [path[done]]], keys[:, places], values[:, places]
            alone = attend(backend, *one, root, length + done, scale)
            assert same_bits(alone[:, 0], y[:, path[done]])


@each_exact_backend
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(2, 25), length=lengths)
@settings(max_examples=15, deadline=None)
def test_a_tree_row_has_the_same_bits_in_any_order_of_the_rows(backend, seed, rows, length):
    rng = np.random.default_rng(seed)
    parents = random_parents(rng, rows)
    queries, keys, values = case(rng, 4, 2, 32, length, rows)
    y = attend(backend, queries, keys, values, parents, length, 0.3)
    # another order in which parents still stand above their children, some leaves left out
    order = [0]
    while len(order) < rows:
        ready = [r for r in range(rows) if r not in order and parents[r] in order]
        order.append(int(rng.choice(ready)))
    order = order[: int(rng.integers(1, rows + 1))]
    shuffled = np.array([-1, *(order.index(parents[r]) for r in order[1:])], np.int32)
    places = [*range(length), *(length + r for r in order)]
    again = attend(
        backend, queries[:, order], keys[:, places], values[:, places], shuffled, length, 0.3
    )
    assert same_bits(again, y[:, order])


@each_exact_backend
def test_room_behind_the_keys_changes_nothing(backend):
    """Buffers grow; their capacity is no input."""
    rng = np.random.default_rng(5)
    parents = random_parents(rng, 12)
    queries, keys, values = case(rng, 4, 2, 64, 100, 12, spare=300)
    y = attend(backend, queries, keys, values, parents, 100, 0.125)
    tight = attend(backend, queries, keys[:, :112], values[:, :112], parents, 100, 0.125)
    assert same_bits(y, tight)
