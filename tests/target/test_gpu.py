"""A whole target on the GPU kernels, run by the shim: trees are decoding, to the bit.

The prompt has more rows than the kernels take, so that it runs on plain MLX and quickly.
"""

import mlx.core as mx
import numpy as np
import pytest

from specdec.budget import Fixed
from specdec.engine import Engine
from specdec.kernels.array import Backend
from specdec.kernels.executor import gpu_kernels
from specdec.kernels.gated_delta import mix_tree
from specdec.kernels.gpu import expert_launches, graphs, linear
from specdec.kernels.gpu.in_place import write_in_place
from specdec.kernels.gpu.kernel import Launch
from specdec.kernels.gpu.limits import MAX_ROWS, Unsupported, refused
from specdec.kernels.gpu.tiles import use_tiles
from specdec.target import verify_graph
from specdec.target.model import Target
from specdec.target.state import KV_STEP
from tests.backends import REFERENCE
from tests.checkpoints import FAMILIES, write_checkpoint
from tests.graphs import Told, graphs_as_words, graphs_on_shim
from tests.metal.build import compiler
from tests.metal.run import through_shim
from tests.targets import logits_of, opened, prefill, state_bytes, step, tree_of

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")

GPU = Backend("metal", mx.float32, "a test asked for it")
SHORT = Backend("metal", mx.bfloat16, "a test asked for it")
PROMPT = np.random.default_rng(3).integers(0, 320, MAX_ROWS + 8).tolist()
PARENTS = [-1, 0, 0, 1, 3, 1, 2]
PATH = [0, 1, 3, 4]


@pytest.fixture
def on_shim():
    with graphs_on_shim(), write_in_place():
        yield


@pytest.fixture(params=["in place", "through MLX"])
def either_way(request):
    """Kernels write into keys and values, or MLX does."""
    with graphs_on_shim(), write_in_place(request.param == "in place"):
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_is_decoding_its_paths(family, tmp_path, on_shim):
    folder = write_checkpoint(tmp_path, family)
    tree = tree_of(np.random.default_rng(4).integers(0, 320, len(PARENTS)), PARENTS)
    with opened(folder, GPU) as target, opened(folder, REFERENCE) as reference:
        prefill(target, PROMPT)
        output = logits_of(target.verify(tree))
        target.commit(PATH)
        after = state_bytes(target)

        target.reset()
        prefill(target, PROMPT)
        for row in PATH:
            assert step(target, tree.tokens[row]).tobytes() == output[row].tobytes()
        assert state_bytes(target) == after

        with gpu_kernels(False):
            prefill(reference, PROMPT)
            expected = logits_of(reference.verify(tree))
        np.testing.assert_allclose(output, expected, atol=2e-4)


@pytest.fixture
def on_matrix_units(on_shim):
    """Matrices of all sizes are multiplied there; names of the kernels that ran."""
    ran: list[str] = []
    on_cpu = Launch.__call__

    def call(self, *inputs):
        ran.append(self.kernel.name)
        return on_cpu(self, *inputs)

    linear._linear.cache_clear()
    expert_launches.launches.cache_clear()
    # undone before the shim is: its launches would stay otherwise
    with use_tiles(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "LARGE", 1)
        patch.setattr(Launch, "__call__", call)
        yield ran
    linear._linear.cache_clear()
    expert_launches.launches.cache_clear()


@pytest.mark.parametrize("packing", [(4, 32), (8, 32), None], ids=str)
def test_a_tree_is_decoding_its_paths_on_matrix_units(packing, tmp_path, on_matrix_units):
    # MLX multiplies no experts in bfloat16 on a CPU: a prompt of few rows runs on kernels
    prompt = PROMPT if packing else PROMPT[:4]
    folder = write_checkpoint(tmp_path, FAMILIES[-1], quantize=packing)
    tree = tree_of(np.random.default_rng(4).integers(0, 320, len(PARENTS)), PARENTS)
    with opened(folder, SHORT) as target:
        prefill(target, prompt)
        output = logits_of(target.verify(tree))
        target.commit(PATH)
        after = state_bytes(target)
        target.reset()
        prefill(target, prompt)
        for row in PATH:
            assert step(target, tree.tokens[row]).tobytes() == output[row].tobytes()
        assert state_bytes(target) == after
    tiled = {"linear_tiles", "route_normed", "expert_hidden_tiles", "expert_sum_tiles"}
    assert tiled <= set(on_matrix_units)
    assert "normed_rows" not in on_matrix_units


@pytest.mark.parametrize("backend", ["float32", "matrix units"])
def test_streamed_experts_have_the_bits_of_resident_ones(backend, tmp_path, request):
    """Two slots: every layer takes several waves."""
    request.getfixturevalue("on_shim" if backend == "float32" else "on_matrix_units")
    folder = write_checkpoint(tmp_path, FAMILIES[-1])
    tree = tree_of([5, 9, 11], [-1, 0, 0])
    outputs = []
    for options in ({}, {"pins": 1, "slots": 4}):
        with opened(folder, GPU if backend == "float32" else SHORT, **options) as target:
            prefill(target, PROMPT)
            outputs.append(logits_of(target.verify(tree)))
    assert outputs[0].tobytes() == outputs[1].tobytes()


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_are_passes_over_other_trees_of_their_kind(
    family, parts, tmp_path, on_shim, monkeypatch
):
    """Trees of other shapes, behind other tokens, go through the graphs of the first one."""
    for name in ("FIRST", "LAYERS"):
        monkeypatch.setattr(verify_graph, name, 4 // parts)
    rng = np.random.default_rng(5)
    shapes = [PARENTS, [-1, 0, 1, 1, 0, 4, 4], [-1, 0, 0, 1, 3, 1, 2]]
    trees = [tree_of(rng.integers(0, 320, 7), parents) for parents in shapes]
    folder = write_checkpoint(tmp_path, family)
    found = []
    with opened(folder, GPU, taps=(0,)) as target:
        graph, body = target._graph, target.model.verify
        for compiled in (True, False):
            if not compiled:
                monkeypatch.setattr(target, "_graph", body)
            target.reset()
            prefill(target, PROMPT)
            for tree in trees:
                output = target.verify(tree)
                found.append([logits_of(output).tobytes(), np.array(output.taps).tobytes()])
                target.commit([0, 1])
                found[-1] += state_bytes(target)
        assert len(graph.kinds) == parts
    assert found[:3] == found[3:]


def test_few_graphs_are_kept_and_none_of_a_smaller_buffer(tmp_path, on_shim, monkeypatch):
    monkeypatch.setattr(graphs, "GRAPHS", 2)
    with opened(write_checkpoint(tmp_path, FAMILIES[0]), GPU) as target:
        prefill(target, PROMPT)
        kept = []
        for rows in (1, 2, 1, 3):
            target.verify(tree_of(np.arange(rows), np.arange(-1, rows - 1)))
            kept.append([kind[0] for kind in target._graph.kinds])
        assert kept == [[1], [1, 2], [2, 1], [1, 3]]
        (lone,) = (kind for kind in target._graph.kinds if kind[0] == 1)
        target.state.make_room(KV_STEP)
        target.verify(tree_of([1], [-1]))
        assert [kind for kind in target._graph.kinds if kind[0] == 1][-1] != lone


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_holds_nothing_of_the_pass_it_was_traced_for(family, tmp_path, monkeypatch):
    """MLX tells what a graph is made of: constants, operations, their arguments, kernels' texts."""
    told = graphs_as_words(monkeypatch)
    folder = write_checkpoint(tmp_path, family)
    with opened(folder, GPU, taps=(0,)) as target:
        for length, parents in ((40, PARENTS), (57, [-1, 0, 1, 1, 0, 4, 4])):
            target.reset()
            target._graph.clear()
            with gpu_kernels(False):
                prefill(target, [*PROMPT, *PROMPT][:length])
            with gpu_kernels(), pytest.raises(Told):
                target.verify(tree_of(np.arange(7) + length, parents))
    assert "CustomKernel" in told[0]
    assert told[0] == told[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_commits_are_graphs_for_any_path(family, tmp_path, either_way, monkeypatch):
    """Paths that move rows and that do not, of several lengths, behind other tokens."""
    folder = write_checkpoint(tmp_path, family)
    paths = [[0, 1, 3, 4], [0], [0, 2, 6], [0, 1], [0, 1, 5], [0, 2]]
    found = []
    with opened(folder, GPU) as target:
        for compiled in (True, False):
            if not compiled:
                monkeypatch.setattr(target, "_commits", lambda this, path: this.commit(path))
            target.reset()
            prefill(target, PROMPT)
            for at, path in enumerate(paths):
                target.verify(tree_of(np.arange(7) + at, [-1, 0, 0, 1, 3, 1, 2]))
                target.commit(path)
                found.append(state_bytes(target))
            if compiled:
                assert [kind[:2] for kind in target._commits.kinds] == [(7, False), (7, True)]
    assert found[: len(paths)] == found[len(paths) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_commit_holds_nothing_of_the_path_it_was_traced_for(family, tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, family)
    told = graphs_as_words(monkeypatch)
    to_words = mx.compile
    with opened(folder, GPU) as target:
        for length, path in ((40, [0, 2]), (57, [0, 1, 4])):
            monkeypatch.setattr(mx, "compile", lambda traced: traced)
            target.reset()
            target._commits.clear()
            with gpu_kernels(False):
                prefill(target, [*PROMPT, *PROMPT][:length])
            with gpu_kernels(), through_shim():
                target.verify(tree_of(np.arange(5) + length, [-1, 0, 0, 1, 1]))
            monkeypatch.setattr(mx, "compile", to_words)
            with gpu_kernels(), pytest.raises(Told):
                target.commit(path)
    assert "SliceUpdate" in told[0]
    assert told[0] == told[1]


@pytest.mark.parametrize("streamed", [False, True])
def test_no_round_copies_the_buffers(streamed, tmp_path):
    """Rows are written into keys and values in place, by passes and by commits that move some."""
    refused.clear()  # else passes are no graphs; MLX compiles them from the references
    options = {"pins": 1, "slots": 8} if streamed else {}
    with opened(write_checkpoint(tmp_path, FAMILIES[0]), GPU, **options) as target:
        prefill(target, PROMPT)
        places = []
        for path in ([0, 2], [0, 1, 3, 4], [0]):
            target.verify(tree_of(np.arange(len(PARENTS)), PARENTS))
            places.append(places_of([*target.state.keys, *target.state.values]))
            target.commit(path)
            places.append(places_of([*target.state.keys, *target.state.values]))
        assert target.compiled != streamed
    assert places == places[:1] * len(places)


def test_rounds_in_place_make_no_new_buffers(tmp_path, on_shim):
    with opened(write_checkpoint(tmp_path, FAMILIES[0]), GPU) as target:
        prefill(target, PROMPT)
        buffers = [*target.state.keys, *target.state.values]
        for path in ([0, 2], [0, 1, 3, 4], [0]):
            target.verify(tree_of(np.arange(len(PARENTS)), PARENTS))
            target.commit(path)
        assert target.state.length == len(PROMPT) + 7
        after = [*target.state.keys, *target.state.values]
        assert all(a is b for a, b in zip(after, buffers, strict=True))


def test_a_path_is_kept_where_its_graph_cannot_be(tmp_path, on_shim):
    """A kernel was refused after the pass: what is moved stands in the buffers alone."""
    found = []
    with opened(write_checkpoint(tmp_path, FAMILIES[0]), GPU) as target:
        for refuse in (False, True):
            target.reset()
            prefill(target, PROMPT)
            target.verify(tree_of(np.arange(len(PARENTS)), PARENTS))
            if refuse:
                refused["of another model"] = None
            target.commit(PATH)
            refused.clear()
            found.append(state_bytes(target))
    assert found[0] == found[1]


def places_of(buffers: list[mx.array]) -> list[int]:
    """Where they lie in memory."""
    mx.eval(buffers)
    return [np.array(one, copy=False).__array_interface__["data"][0] for one in buffers]


@pytest.mark.parametrize("family", FAMILIES)
def test_looking_ahead_changes_nothing(family, tmp_path, on_shim, monkeypatch):
    """The pass of the next token is begun before the token is known to the host."""
    folder = write_checkpoint(tmp_path, family)
    found = []
    with opened(folder, GPU) as target:
        engine, looked = Engine(target), Target.look_ahead
        for ahead in (True, False):
            used: list[object] = []

            def look(self, token, ahead=ahead, used=used):
                used.append(self._ahead)
                if ahead:
                    looked(self, token)

            monkeypatch.setattr(Target, "look_ahead", look)
            engine.prefill(PROMPT)
            tokens = [engine.step(Fixed(1)).bonus for _ in range(4)]
            found.append((tokens, state_bytes(target)))
            assert len(used) == 4
            assert (target._ahead is not None) == ahead
        assert found[0] == found[1]

        # a round that is run again, another token, a tree: what was begun ahead is not taken
        monkeypatch.setattr(Target, "look_ahead", looked)
        seven = tree_of([7], [-1])

        def after(begun, other, prompt_between):
            target.reset()
            prefill(target, PROMPT)
            target.verify(seven)
            if begun:
                target.look_ahead(mx.array([7], mx.int32))
            if prompt_between:
                target.commit([0])
                prefill(target, PROMPT)
            return logits_of(target.verify(other)).tobytes()

        for other in (seven, tree_of([8], [-1]), tree_of([7, 3, 4], [-1, 0, 0])):
            assert after(True, other, False) == after(False, other, False)
        # nor where a prompt came between
        assert after(True, seven, True) == after(False, seven, True)


def test_what_a_kernel_refuses_is_never_a_graph(tmp_path, monkeypatch, capsys):
    """A reference would bake in the tree that it was traced for."""
    monkeypatch.setattr(mx, "compile", lambda traced: traced)
    refused.clear()

    def refuse(*arguments, **named):
        raise Unsupported("kernel delta_tree: a test, expected none")

    monkeypatch.setattr("specdec.kernels.gpu.gated_delta.mix_tree", refuse)
    monkeypatch.setattr(mix_tree, "_found", {})
    folder = write_checkpoint(tmp_path, FAMILIES[-1])
    with opened(folder, GPU) as target, gpu_kernels(), through_shim():
        prefill(target, PROMPT)
        target.verify(tree_of(np.arange(3), [-1, 0, 0]))
        assert not target._graph.kinds
        target.commit([0])
    assert "a test, expected none" in capsys.readouterr().err
    refused.clear()
