"""Trees that a GPU grew, and passes over them begun ahead, of a target run by the shim."""

import mlx.core as mx
import numpy as np
import pytest

from specdec.kernels.executor import gpu_kernels
from specdec.kernels.gpu.grown import grown
from specdec.kernels.gpu.in_place import write_in_place
from specdec.kernels.walked import CAME, came_before
from specdec.target.grown_tree import GrownTree
from specdec.target.model import Target
from specdec.tree.draft_tree import DraftTree
from specdec.tree.walk import walk
from tests.checkpoints import FAMILIES, write_checkpoint
from tests.graphs import Told, graphs_as_words, graphs_on_shim
from tests.metal.build import compiler
from tests.metal.run import through_shim
from tests.target.test_gpu import GPU, PROMPT
from tests.targets import logits_of, opened, prefill, state_bytes, tree_of

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")

BONUS = 7


@pytest.fixture
def on_shim():
    with graphs_on_shim(), write_in_place():
        yield


def drafted(tokens: list[list[int]], total: float = 2.0, apart: float = 3.0) -> mx.array:
    """A draft's answer, as kernels.top_tokens: of each slot its tokens, `apart` in their logits."""
    slots, width = len(tokens), len(tokens[0])
    floats = np.zeros((slots, width + 2), np.float32)
    floats[:, :width] = -apart * np.arange(width)
    floats[:, width + 1] = total
    ids = np.array(tokens, np.int32)
    return mx.array(np.concatenate([ids, floats.view(np.int32), np.ones_like(ids[:, :1])], axis=1))


def walked(target: Target, tree: DraftTree, best: np.ndarray) -> tuple[list[int], mx.array]:
    """The greedy path, and what the GPU would say came of the round."""
    path, bonus = walk(tree, best.tolist().__getitem__)
    came = np.zeros(CAME, np.int32)
    came[: 1 + len(path)] = [len(path), *path]
    came[33:35] = bonus, target.length + len(path)
    return list(path), mx.array(came)


def begin_ahead(target: Target, found: mx.array) -> int:
    """A round of which the next one is begun, with the tree of `found`; the bonus token."""
    tree = target.grow(drafted([[5, 9, 3], [6, 5, 2]]), 3, BONUS)
    output = target.verify(tree)
    assert output.verdict is not None
    path, came = walked(target, tree.host, output.verdict.best)
    assert target.look_past(found, 2, came) is not None
    target.commit(path)
    return int(came[33])


def test_a_tree_of_the_host_is_not_taken_for_the_one_that_was_begun(tmp_path, on_shim):
    """It may have the same tokens below other parents."""
    ahead = drafted([[5, 9], [9, 4]], apart=0.0)  # two beside each other
    with opened(write_checkpoint(tmp_path, FAMILIES[-1]), GPU) as target:
        prefill(target, PROMPT)
        bonus = begin_ahead(target, ahead)
        tree = tree_of([bonus, 5, 9], [-1, 0, 1])
        begun = target._ahead.grown.host
        assert begun.tokens.tolist() == tree.tokens.tolist()
        assert begun.parents.tolist() != tree.parents.tolist()
        found = logits_of(target.verify(tree))
        target.commit([0, 1, 2])
        after = state_bytes(target)

        target.reset()
        prefill(target, PROMPT)
        begin_ahead(target, ahead)
        target._ahead = None
        assert logits_of(target.verify(tree)).tobytes() == found.tobytes()
        target.commit([0, 1, 2])
        assert state_bytes(target) == after


def test_what_was_begun_behind_a_draft_that_is_not_finite_is_dropped(tmp_path, on_shim):
    with opened(write_checkpoint(tmp_path, FAMILIES[-1]), GPU) as target:
        prefill(target, PROMPT)
        bonus = begin_ahead(target, drafted([[5, 9], [9, 4]], np.nan))
        target.verify(DraftTree.root(bonus))
        target.commit([0])


def test_a_path_without_any_chance_weighs_what_it_does_on_the_host(on_shim):
    answer = np.array(drafted([[5, 9], [9, 4]]))
    answer[0, 3] = answer[1, 2] = np.float32(-np.inf).view(np.int32)
    turn = mx.zeros((8, 4)), mx.zeros((8, 4))
    tree = GrownTree(grown(mx.array(answer), mx.array(came_before(BONUS, 3)), turn, 3, 0))
    weights = tree.host.log_weights
    assert np.isfinite(weights[:2]).all()
    assert weights[2] == -np.inf


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_in_place_hold_nothing_of_what_they_were_traced_for(family, tmp_path, monkeypatch):
    """Passes over trees of the host and of the GPU are one graph, and so are commits ahead."""
    told = graphs_as_words(monkeypatch)
    to_words = mx.compile
    passes, commits = [], []
    with opened(write_checkpoint(tmp_path, family), GPU) as target, write_in_place():
        for length, other in ((40, 5), (57, 6)):
            target.reset()
            with gpu_kernels(False):
                prefill(target, [*PROMPT, *PROMPT][:length])
            with gpu_kernels(), through_shim():
                found = drafted([[other, 9, 3], [6, 5, 2]], apart=3.0 * (other - 5))
                grown = target.grow(found, 3, BONUS + other)
                mx.eval(grown.made)
            for tree in (grown, tree_of([1, 2, 3, other], [-1, 0, 1, 0])):
                monkeypatch.setattr(mx, "compile", to_words)
                target._graph.clear()
                with gpu_kernels(), pytest.raises(Told):
                    target.verify(tree)
                passes.append(told.pop())
            monkeypatch.setattr(mx, "compile", lambda traced: traced)
            target._graph.clear()
            with gpu_kernels(), through_shim():
                output = target.verify(grown)
                _, came = walked(target, grown.host, output.verdict.best)
            monkeypatch.setattr(mx, "compile", to_words)
            target._commits.clear()
            with gpu_kernels(), pytest.raises(Told):
                target.look_past(found, 3, came)
            commits.append(told.pop())
    assert "kept_rows" in commits[0]
    assert "attention_inputs" in passes[0]
    assert passes == passes[:1] * 4
    assert commits == commits[:1] * 2
