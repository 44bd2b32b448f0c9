"""A whole target on the GPU kernels, run by the shim: trees are decoding, to the bit.

The prompt has more rows than the kernels take, so that it runs on plain MLX and quickly.
"""

import mlx.core as mx
import numpy as np
import pytest

from specdec.kernels.array import Backend
from specdec.kernels.executor import gpu_kernels
from specdec.kernels.gpu.limits import MAX_ROWS, refused
from tests.backends import REFERENCE
from tests.checkpoints import FAMILIES, write_checkpoint
from tests.metal.build import compiler
from tests.metal.run import through_shim
from tests.targets import logits_of, opened, prefill, state_bytes, step, tree_of

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")

GPU = Backend("metal", mx.float32, "a test asked for it")
PROMPT = np.random.default_rng(3).integers(0, 320, MAX_ROWS + 8).tolist()
PARENTS = [-1, 0, 0, 1, 3, 1, 2]
PATH = [0, 1, 3, 4]


@pytest.fixture
def on_shim():
    refused.clear()
    with gpu_kernels(), through_shim():
        yield
    assert not refused  # every operation ran as a kernel


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


def test_streamed_experts_have_the_bits_of_resident_ones(tmp_path, on_shim):
    """Two slots: every layer takes several waves."""
    folder = write_checkpoint(tmp_path, FAMILIES[-1])
    tree = tree_of([5, 9, 11], [-1, 0, 0])
    outputs = []
    for options in ({}, {"pins": 1, "slots": 4}):
        with opened(folder, GPU, **options) as target:
            prefill(target, PROMPT)
            outputs.append(logits_of(target.verify(tree)))
    assert outputs[0].tobytes() == outputs[1].tobytes()
