"""However experts are read and kept, a session computes the same bits."""

import time

import numpy as np
import pytest

from specdec import checkpoint as checkpoint_module
from specdec.kernels import experts as kernels
from specdec.target import mlp
from specdec.target.streaming import Streaming
from tests.backends import each_exact_backend, same_bits
from tests.checkpoints import write_checkpoint
from tests.targets import logits_of, opened, prefill, state_bytes, tree_of

PROMPT = np.random.default_rng(1).integers(0, 320, 40).tolist()
WAYS = [
    Streaming(),
    Streaming(direct=True, queue_depth=1),
    Streaming(queue_depth=2, policy="s3-fifo", protect=(1, 0), rows=5),
    Streaming(direct=True, policy="s3-fifo", protect=(0, 0), rows=5),
]


def session(target, prefetching=False):
    """Logits and state of some rounds; experts come early at random if so asked."""
    rng = np.random.default_rng(2)
    found = [logits_of(prefill(target, PROMPT, 16))]
    for _ in range(4):
        if prefetching:
            for layer in target.experts.store.layers:
                target.experts.prefetch(layer, rng.integers(0, 8, 2))
        else:
            rng.integers(0, 8, (4, 2))
        output = target.verify(tree_of(rng.integers(0, 320, 5), [-1, 0, 0, 1, 3]))
        found.append(logits_of(output))
        target.commit([0, 1, 3])
    return found, state_bytes(target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("streaming"), "qwen3_next")


@each_exact_backend
@pytest.mark.parametrize("slots", [1, 7, 12, 24])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_same_bits_however_experts_come(folder, backend, slots, way):
    with opened(folder, backend) as resident:
        logits, state = session(resident)
    for prefetching in (False, True):
        with opened(folder, backend, pins=1, slots=slots, streaming=way) as target:
            others, other = session(target, prefetching)
            assert other == state
            assert all(same_bits(a, b) for a, b in zip(logits, others, strict=True))


@each_exact_backend
def test_the_shared_expert_begins_while_experts_are_read(folder, backend, monkeypatch):
    """Also where none of them is there yet, and nothing else could be computed."""
    real = checkpoint_module.read_at
    under_way: list[int] = []

    def slow(*arguments):
        time.sleep(0.01)
        return real(*arguments)

    def shared(*arguments):
        loads = target.experts._loads._running
        under_way.append(sum(not load.request.done for load in loads))
        return kernels.shared_hidden(*arguments)

    with opened(folder, backend, pins=1, slots=24, streaming=Streaming(prefetch="off")) as target:
        monkeypatch.setattr(checkpoint_module, "read_at", slow)
        monkeypatch.setattr(mlp, "shared_hidden", shared)
        prefill(target, PROMPT[:1])
        unpinned = sum(not one.pinned for one in target.experts.counters())
        assert under_way == [1] * unpinned


@each_exact_backend
def test_the_same_bits_from_a_disk_of_any_speed(folder, backend, monkeypatch):
    with opened(folder, backend) as resident:
        logits, state = session(resident)
    real, rng = checkpoint_module.read_at, np.random.default_rng(3)

    def slow(*arguments):
        time.sleep(float(rng.choice([0, 0, 0.002])))
        return real(*arguments)

    with opened(folder, backend, pins=1, slots=9) as target:
        monkeypatch.setattr(checkpoint_module, "read_at", slow)
        others, other = session(target)
    assert other == state
    assert all(same_bits(a, b) for a, b in zip(logits, others, strict=True))
