"""The draft on the GPU kernels, run by the shim: one graph for any number of told rows."""

import mlx.core as mx
import numpy as np
import pytest

from specdec.draft.candidates import as_block
from specdec.draft.graph import Walk
from specdec.draft.model import Draft
from specdec.errors import NonFiniteError
from specdec.kernels.array import Backend
from specdec.kernels.executor import gpu_kernels
from specdec.kernels.gpu.in_place import write_in_place
from specdec.kernels.tapped import Taps
from specdec.kernels.walked import CAME, came_before, walked
from specdec.tree.draft_tree import DraftTree
from specdec.tree.walk import walk
from tests.draft.reference import BLOCK, CASES, HIDDEN, TAPS, Reference, make_draft
from tests.graphs import Told, graphs_as_words, graphs_on_shim
from tests.metal.build import compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")

GPU = Backend("metal", mx.float32, "a test asked for it")
WIDTH = 9


@pytest.fixture(params=["in place", "through MLX"])
def on_shim(request):
    """Kernels write into the caches, or MLX does."""
    with graphs_on_shim(), write_in_place(request.param == "in place"):
        yield


def random_taps(rows: int, seed: int = 3) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array(rng.standard_normal((rows, TAPS * HIDDEN)).astype(np.float32))


def draft_of(case: str) -> tuple[Draft, Reference]:
    draft, reference = make_draft(case, 2, GPU, head_dim=32)
    assert draft.compiled
    return draft, reference


def asked(draft: Draft, bonus: int, slots: int | None = None) -> bytes:
    block = draft.propose(bonus, WIDTH, slots)
    return block.tokens.tobytes() + block.log_probs.tobytes()


@pytest.mark.parametrize("case", ["all", "causal", "narrow-causal-window", "window-of-one"])
def test_proposals_are_those_of_the_formulas(case, on_shim):
    """Rows told by the graph, by plain operations, none at all; a narrower proposal between."""
    draft, reference = draft_of(case)
    taps, at = random_taps(45), 0
    for step, bonus in ((9, 1), (1, 2), (BLOCK, 3), (0, 3), (3, 4), (20, 5), (2, 6)):
        if step:
            draft.extend(taps[at : at + step])
        at += step
        assert draft.length == at
        expected = reference.log_probs(np.array(taps[:at]), bonus)
        block = draft.propose(bonus, WIDTH)
        np.testing.assert_array_equal(
            block.tokens, np.argsort(-expected, axis=1, kind="stable")[:, :WIDTH]
        )
        best = np.take_along_axis(expected, block.tokens, axis=1)
        np.testing.assert_allclose(block.log_probs, best, atol=1e-4)
        first = draft.propose(bonus, 3, 2)
        assert np.array_equal(first.tokens, block.tokens[:2, :3])
        assert np.array_equal(first.log_probs, block.log_probs[:2, :3])


@pytest.mark.parametrize("case", CASES)
def test_compiled_graphs_serve_other_rounds_than_their_first(case):
    """MLX's own compilation, of the references: no shim, which needs values."""
    draft, reference = draft_of(case)
    taps, at = random_taps(300), 0
    rng = np.random.default_rng(5)
    while at < len(taps) - BLOCK:
        count = int(rng.integers(1, BLOCK + 1))
        told = Taps([taps[at : at + BLOCK]], range(count))
        if at % 3 == 0:  # a chain, of which the first rows are taken
            tokens = np.arange(BLOCK, dtype=np.int32)
            chosen = [*range(1, count), (at + count) % 7 + 50, *[0] * BLOCK][:BLOCK]
            verdict = mx.array([[token, 1] for token in chosen], mx.int32)
            draft.look_past(
                told.parts, Walk(np.concatenate([tokens, tokens - 1]), verdict), WIDTH, BLOCK
            )
        draft.extend(told)
        at += count
        bonus = at % 7 + 50
        block = draft.propose(bonus, WIDTH, BLOCK)
        if at % 5 == 0:
            draft.look_ahead(Taps([taps[at : at + BLOCK]], range(2)), 9, WIDTH)
        if at < 20 or at > len(taps) - 3 * BLOCK:
            expected = reference.log_probs(np.array(taps[:at]), bonus)
            best = np.take_along_axis(expected, block.tokens, axis=1)
            np.testing.assert_allclose(block.log_probs, best, atol=1e-4)
    assert draft._graph is not None
    # with a walk and without, of buffers that grew
    assert len(draft._graph._graphs.kinds) <= 6


@pytest.mark.parametrize("case", ["sliding", "plain"])
def test_many_rounds_move_the_rows_of_sliding_layers(case, on_shim):
    draft, reference = draft_of(case)
    taps = random_taps(600)
    draft.extend(taps[:230])
    for at in range(230, 260, BLOCK):
        draft.extend(taps[at : at + BLOCK])
        asked(draft, 7, 1)
    draft.extend(taps[draft.length : 500])
    for at in range(500, 520, BLOCK):
        draft.extend(taps[at : at + BLOCK])
        asked(draft, 7, 1)
    expected = reference.log_probs(np.array(taps[: draft.length]), 7)
    block = draft.propose(7, WIDTH)
    best = np.take_along_axis(expected, block.tokens, axis=1)
    np.testing.assert_allclose(block.log_probs, best, atol=1e-4)


def test_rows_that_do_not_count_have_no_say(on_shim):
    found = []
    for filling in (0.0, 1e4):
        draft, _ = draft_of("sliding")
        rows = random_taps(BLOCK)
        rows[2:] = filling
        for _ in range(3):
            draft.extend(Taps([rows], range(2)))
            found.append(asked(draft, 5))
    assert found[:3] == found[3:]


@pytest.mark.parametrize("case", ["sliding"])
def test_what_is_begun_ahead_is_what_would_have_been_done(case, on_shim, monkeypatch):
    """Taken, or dropped in each of the ways there are: the answers stay the same to the bit."""
    rows, others = random_taps(BLOCK), random_taps(BLOCK, 8)
    parts = [rows[:, i : i + HIDDEN] for i in range(0, rows.shape[1], HIDDEN)]
    taps, other = Taps(parts, [0, 2, 3, 5]), Taps([others], range(3))

    def answers(ahead) -> list[bytes]:
        draft, _ = draft_of(case)
        draft.extend(random_taps(30, 4))
        found = [asked(draft, 1)]
        ahead(draft)
        draft.extend(taps)
        found += [asked(draft, 9), asked(draft, 9, 3)]
        draft.extend(others[:1])
        return [*found, asked(draft, 2)]

    plain = answers(lambda draft: None)
    begun = [
        lambda draft: draft.look_ahead(taps, 9, WIDTH),
        lambda draft: draft.look_ahead(taps, 8, WIDTH),
        lambda draft: draft.look_ahead(taps, 9, 3, 2),
        lambda draft: draft.look_ahead(Taps(parts, range(6)), 9, WIDTH),
        lambda draft: draft.look_ahead(other, 9, WIDTH),
        lambda draft: (draft.look_ahead(other, 9, WIDTH), asked(draft, 3)),
    ]
    assert [answers(ahead) for ahead in begun] == [plain] * len(begun)

    # what was begun is taken, and nothing is begun again
    draft, _ = draft_of(case)
    draft.extend(random_taps(30, 4))
    asked(draft, 1)
    draft.look_ahead(taps, 9, WIDTH)
    draft.extend(taps)
    assert draft.length == 34
    monkeypatch.setattr(draft, "_graph", None)
    monkeypatch.setattr(Draft, "compiled", property(lambda self: True))
    assert asked(draft, 9) == plain[1]


@pytest.mark.parametrize("case", ["sliding", "narrow-window"])
def test_what_is_begun_before_the_path_is_known(case, on_shim):
    """The device walks: paths of all lengths, down trees that branch."""
    tokens = np.array([7, 1, 2, 3, 4, 5], np.int32)
    parents = np.array([-1, 0, 0, 2, 3, 2], np.int32)
    best = {(0,): [9], (0, 1): [1, 8], (0, 2, 3, 4): [2, 0, 3, 4, 9], (0, 2, 5): [2, 0, 5, 0, 0, 6]}
    rows = random_taps(6, 11)
    tapped = [rows[:, i : i + HIDDEN] for i in range(0, rows.shape[1], HIDDEN)]
    for known, (path, chosen) in zip((4, 2, 250, 4), best.items(), strict=True):
        answers = []
        for ahead in (True, False):
            draft, _ = draft_of(case)
            draft.extend(random_taps(known, 4))
            asked(draft, 1)
            verdict = mx.array([[b, 1] for b in [*chosen, *[0] * 6][:6]], mx.int32)
            if ahead:
                tree: np.ndarray | mx.array = np.concatenate([tokens, parents])
                if known != 250:  # one that the device grew is there already
                    tree = mx.array(tree)
                draft.look_past(tapped, Walk(tree, verdict), WIDTH, BLOCK)
                begun = draft._begun
            draft.extend(Taps(tapped, path))
            assert draft.length == known + len(path)
            block = draft.propose(chosen[path[-1]], WIDTH, BLOCK)
            answers.append(block.tokens.tobytes() + block.log_probs.tobytes())
            if ahead:  # it was this
                assert begun is not None
                assert np.array_equal(as_block(np.array(begun.answer.found)).tokens, block.tokens)
            draft.extend(rows[:1])
            answers[-1] += asked(draft, 2)
        assert answers[0] == answers[1]


def test_the_walk_is_that_of_the_reference(on_shim):
    rng = np.random.default_rng(2)
    for rows in (1, 2, 7, 32):
        parents = np.array([-1, *(rng.integers(max(0, r - 3), r) for r in range(1, rows))])
        tokens, best = rng.integers(0, 3, rows), rng.integers(0, 3, rows)
        numbers = rng.integers(-20, 90, 1 + 2 + 2 * 33 + 4 * 33 * 2 + 1)
        asked = mx.array(np.concatenate([tokens, parents, numbers]).astype(np.int32))
        verdict = mx.array(np.stack([best, best], axis=1).astype(np.int32))
        by_reference = walked.reference  # type: ignore[attr-defined]
        tree, rest = asked[: 2 * rows], asked[2 * rows :]
        for split in ((asked, asked), (tree, rest)):
            expected = by_reference(verdict, *split, 2, 33)
            for one, wanted in zip(walked(verdict, *split, 2, 33), expected, strict=True):
                assert mx.array_equal(one, wanted)
        chosen = best.tolist()
        path, bonus = walk(DraftTree(tokens, parents, np.zeros(rows)), chosen.__getitem__)
        came = came_before(bonus, int(numbers[-1]) + len(path))
        came[: 1 + len(path)] = [len(path), *path]
        found, behind = np.split(np.array(expected[1]), [CAME])
        np.testing.assert_array_equal(found, came)
        np.testing.assert_array_equal(behind, [*np.array(verdict).ravel(), *np.array(tree)])


def test_non_finite_numbers_name_the_layer(on_shim):
    draft, _ = draft_of("plain")
    draft.extend(random_taps(5))
    draft.weights.layers[1].down.data[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="layer 1 of the draft"):
        draft.propose(1, 2)


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "through MLX"])
def test_a_graph_holds_nothing_of_the_pass_it_was_traced_for(in_place, monkeypatch):
    told = graphs_as_words(monkeypatch)
    draft, _ = draft_of("sliding")
    taps = random_taps(90)
    with gpu_kernels(False):
        draft.extend(taps[:20])
    for count, bonus in ((1, 3), (5, 9)):
        draft.extend(Taps([taps[20 : 20 + BLOCK]], range(count)))
        with gpu_kernels(), write_in_place(in_place), pytest.raises(Told):
            draft.propose(bonus, 4)
        assert draft._graph is not None
        draft._graph._graphs.clear()
        with gpu_kernels(False):
            draft.extend(taps[50 + count :])
    assert "CustomKernel" in told[0]
    assert ("SliceUpdate" in told[0]) == (not in_place)
    assert told[0] == told[1]
