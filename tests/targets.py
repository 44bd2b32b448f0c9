"""Loaded targets for tests: one call from a folder to a session, and a way to compare states."""

from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

from specdec.checkpoint import Checkpoint
from specdec.kernels.array import Backend, concatenate, to_numpy
from specdec.target.config import TargetConfig
from specdec.target.expert_cache import ExpertCache
from specdec.target.expert_store import ExpertStore
from specdec.target.model import Output, Target
from specdec.target.pins import pinned_layers
from specdec.target.streaming import Streaming
from specdec.tree.draft_tree import DraftTree


def load_target(
    folder: Path,
    backend: Backend,
    pins: int | None = None,
    slots: int = 1,
    taps=(),
    streaming: Streaming | None = None,
) -> Target:
    """A target with `pins` layers resident (None: all of them) and `slots` for the others."""
    checkpoint = Checkpoint.open(folder)
    config = TargetConfig.of(checkpoint)
    store = ExpertStore(checkpoint, config)
    pinned = pinned_layers(len(store.layers) if pins is None else pins, store.layers)
    cache = ExpertCache(store, pinned, slots, backend.dtype, streaming)
    target = Target.load(checkpoint, config, cache, backend, taps)
    cache.load_pinned()
    return target


@contextmanager
def opened(folder: Path, backend: Backend, **options):
    """`load_target`, its files closed at the end."""
    target = load_target(folder, backend, **options)
    try:
        yield target
    finally:
        target.experts.store.checkpoint.close()


def state_bytes(target: Target) -> list[bytes]:
    """Everything a session remembers of the committed tokens, bit by bit."""
    state, length = target.state, target.length
    rows = [*state.keys, *state.values]
    arrays = [*(row[:, :length] for row in rows), *state.conv, *state.recurrent]
    return [np.array([length]).tobytes(), *(to_numpy(array).tobytes() for array in arrays)]


def tree_of(tokens, parents) -> DraftTree:
    return DraftTree(
        np.asarray(tokens, np.int32), np.asarray(parents, np.int32), np.zeros(len(parents))
    )


def prefill(target: Target, tokens, chunk: int = 256, all_logits: bool = False) -> Output:
    """A prompt in chunks: logits of the last row, or of all, and all taps."""
    outputs = [
        target.prefill(tokens[start : start + chunk], all_logits)
        for start in range(0, len(tokens), chunk)
    ]
    logits = concatenate([output.logits for output in outputs])
    taps = concatenate([output.taps for output in outputs])
    return Output(logits if all_logits else logits[-1:], [taps])


def step(target: Target, token: int) -> np.ndarray:
    """Decode one token as budget 1 does: its logits [vocab]."""
    output = target.verify(DraftTree.root(int(token)))
    target.commit([0])
    return to_numpy(output.logits)[0]


def logits_of(output: Output) -> np.ndarray:
    return to_numpy(output.logits)


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a one-file checkpoint: `change(tensors)` edits or replaces them."""
    file = folder / "model.safetensors"
    tensors = dict(mx.load(str(file)))  # type: ignore[arg-type]
    mx.eval(list(tensors.values()))
    tensors = change(tensors) or tensors
    mx.eval(list(tensors.values()))
    file.unlink()
    mx.save_safetensors(str(file), tensors, {"format": "mlx"})
