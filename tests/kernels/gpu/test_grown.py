"""Trees grown by the GPU kernel, on the CPU shim: those of the host, with programs that hold."""

import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

from specdec.draft.candidates import as_block
from specdec.kernels.attention import AttentionLayout
from specdec.kernels.gpu.attention import path_table
from specdec.kernels.gpu.grown import GROWN, grown
from specdec.kernels.gpu.limits import Unsupported
from specdec.kernels.gpu.tree_program import NO_SLOT, most_slots
from specdec.kernels.layout import TreeLayout
from specdec.kernels.walked import came_before
from specdec.tree.build import build
from tests.metal.build import compiler
from tests.metal.cuda import cuda_source
from tests.metal.rules import broken_rules
from tests.metal.run import through_shim

NVCC = shutil.which("nvcc")
needs_shim = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")
LENGTH, HALF = 100, 3


def found_of(slots: int, width: int, seed: int, sharpness: float = 1.0) -> np.ndarray:
    """A draft's answer, as kernels.top_tokens."""
    rng = np.random.default_rng(seed)
    logits = -np.sort(-rng.normal(0, sharpness * 3, (slots, width)).astype(np.float32), axis=1)
    ids = np.stack([rng.permutation(1000)[:width] for _ in range(slots)]).astype(np.int32)
    top, total = logits[:, :1], np.exp(logits - logits[:, :1]).sum(axis=1, keepdims=True) * 1.5
    bits = [part.astype(np.float32).view(np.int32) for part in (logits, top.copy(), total)]
    return np.concatenate([ids, *bits, np.ones((slots, 1), np.int32)], axis=1)


def turns(slots: int) -> tuple[mx.array, mx.array]:
    table = np.random.default_rng(1).normal(size=(2, slots + 9, HALF)).astype(np.float32)
    return mx.array(table[0]), mx.array(table[1])


def after(path: int, bonus: int) -> mx.array:
    """What came of a round whose path had so many rows."""
    came = came_before(bonus, LENGTH)
    came[0] = path
    return mx.array(came)


def check_program(steps: np.ndarray, tree: TreeLayout) -> None:
    """Walked as delta_tree does, every row begins with the state of its parent."""
    states: dict[int, int] = {}  # slot -> row whose state it has
    at_hand = -1  # the state that the root begins with
    assert sorted(steps[:, 0].tolist()) == list(range(tree.rows))
    for row, begin, keep, leaf, *_ in steps.tolist():
        before = at_hand if begin == NO_SLOT else states[begin]
        assert before == tree.parents[row]
        assert leaf == (row not in tree.parents)
        if not leaf:
            at_hand = row
        elif begin != NO_SLOT:
            at_hand = before
        if keep != NO_SLOT:
            assert keep < most_slots(tree.rows)
            states[keep] = row


@needs_shim
@pytest.mark.parametrize(
    ("slots", "rows", "taps", "options"),
    [
        (7, 7, 4, {"sanitize": "memory"}),
        (7, 17, 4, {"order": "reverse"}),
        (4, 32, 2, {"sanitize": "races"}),
        (1, 5, 0, {}),
        (31, 32, 8, {}),
        (3, 2, 4, {}),
    ],
)
def test_trees_are_those_of_the_host(slots, rows, taps, options):
    cos, sin = turns(slots)
    for seed in range(8):
        answer = found_of(slots, rows - 1 + seed % 3, seed, sharpness=0.2 + seed / 4)
        with through_shim(**options):
            made = grown(mx.array(answer), after(seed % 4, 77), (cos, sin), rows, taps)
        tokens, parents, weights = np.array(made.tree)[:-1].reshape(3, rows)
        assert made.tree[-1].item() == 1
        expected = build(77, as_block(answer), rows - 1)
        np.testing.assert_array_equal(parents, expected.parents)
        np.testing.assert_array_equal(tokens, expected.tokens)
        np.testing.assert_array_equal(np.array(made.tokens), expected.tokens)
        np.testing.assert_allclose(weights.view(np.float32), expected.log_weights, rtol=2e-5)

        tree = TreeLayout(expected.parents)
        layout = AttentionLayout(tree, LENGTH)
        np.testing.assert_array_equal(np.array(made.paths), path_table(layout))
        for rows_of, table in zip(made.turn, (cos, sin), strict=True):
            np.testing.assert_array_equal(
                np.array(rows_of), np.array(table)[seed % 4 + tree.depths]
            )
        count, *numbers = np.array(made.program).tolist()
        steps = np.array(numbers).reshape(rows, 4 + taps)
        assert count == rows
        check_program(steps, tree)
        if taps:
            np.testing.assert_array_equal(steps[:, 4:], tree.windows(taps)[steps[:, 0]])


@needs_shim
def test_equal_weights_and_no_chance_at_all_still_make_a_tree():
    answer = found_of(3, 9, 4)
    answer[:, 9:18] = np.float32(0.0).view(np.int32)
    answer[1, 12:18] = np.float32(-np.inf).view(np.int32)
    with through_shim(sanitize="memory"):
        made = grown(mx.array(answer), after(0, 5), turns(3), 10, 4)
    tokens, parents, _ = np.array(made.tree)[:-1].reshape(3, 10)
    tree = TreeLayout(parents)
    assert len({(p, t) for p, t in zip(parents.tolist(), tokens.tolist(), strict=True)}) == 10
    check_program(np.array(made.program)[1:].reshape(10, 8), tree)


@needs_shim
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_draft_that_is_not_finite_is_told(bad):
    answer = found_of(3, 9, 4)
    answer[2, 18] = np.float32(bad).view(np.int32)
    with through_shim(sanitize="memory"):
        made = grown(mx.array(answer), after(0, 5), turns(3), 10, 4)
    assert made.tree[-1].item() == 0
    TreeLayout(np.array(made.tree)[10:20])  # a tree all the same


@pytest.mark.parametrize(("rows", "width"), [(33, 40), (1, 8), (9, 7)])
def test_what_is_not_taken(rows, width):
    with pytest.raises(Unsupported, match=f"{rows} rows"):
        grown(mx.array(found_of(3, width, 0)), after(0, 5), turns(3), rows, 4)


def test_rules():
    assert broken_rules(GROWN) == []


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_cuda_compiles(tmp_path):
    i, f = mx.int32, mx.float32
    template = {"ROWS": 17, "COLUMNS": 19, "SLOTS": 7, "WIDTH": 16, "TAPS": 4}
    source = tmp_path / "kernel.cu"
    source.write_text(cuda_source(GROWN, [i, i, f, f], [i] * 4 + [f] * 2, template))
    flags = ["-arch=sm_90", "-std=c++17", "-cubin", "-Werror=all-warnings"]
    command = [str(NVCC), *flags, str(source), "-o", str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
