"""Peer: mlx-lm, decoding the same prompts from the same checkpoint, greedily and in our dtype.

mlx-lm is an optional extra; it is imported when it is asked for. Refuses, in one line, where it is
not installed or does not load the checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from specdec.bench_grid import Task
from specdec.errors import PeerError
from specdec.metrics import decode_speed, first_difference
from specdec.token_hash import token_sha256

if TYPE_CHECKING:
    import mlx.core as mx

NAME = "mlx-lm"


@dataclass(frozen=True)
class PeerRun:
    """What mlx-lm made of a task, right after our run of budget 1.

    decode_tokens_per_second, seconds_to_first_token: as in specdec.metrics.
    first_difference: position of the first token that is not ours; None when all agree.
    gap: there, how much more probable its token was than its second best, in nats: about rounding
        error where both engines are right. None when all agree.
    """

    task: Task
    repeat: int
    decode_tokens_per_second: float | None
    seconds_to_first_token: float
    token_sha256: str
    first_difference: int | None
    gap: float | None


class Peer:
    """A model loaded by mlx-lm."""

    def __init__(self, folder: Path, dtype: "mx.Dtype", cache_limit: int) -> None:
        """Every float of the model becomes `dtype`, scales of packed weights too.

        cache_limit: bytes of freed memory that MLX may keep while mlx-lm runs: as many as it does
        before we limit it.
        PeerError where mlx-lm is not installed or cannot load the folder.
        """
        import mlx.core as mx

        load_model = _load_model()
        self.version, self._cache_limit = metadata.version(NAME), cache_limit
        try:
            self._model, _ = load_model(folder)
            self._model.set_dtype(dtype)
            mx.eval(self._model.parameters())
        except Exception as error:  # whatever its loader meets, in its own words
            raise self._failed(f"cannot load {folder}", error) from error

    def run(self, task: Task, repeat: int, prompt: Sequence[int], ours: Sequence[int]) -> PeerRun:
        """As many tokens as `ours` has after the prompt; end tokens end nothing here.

        ours: what we emitted; compared after the clock has stopped. PeerError where mlx-lm fails.
        """
        try:
            return self._run(task, repeat, prompt, ours)
        except Exception as error:  # its own code on its own kernels
            raise self._failed(f"failed on {task.prompt}", error) from error

    def _run(self, task: Task, repeat: int, prompt: Sequence[int], ours: Sequence[int]) -> PeerRun:
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        tokens: list[int] = []
        limit = mx.set_cache_limit(self._cache_limit)
        try:
            start = first = perf_counter()
            steps = generate_step(mx.array(list(prompt)), self._model, max_tokens=len(ours))
            for token, _ in steps:
                if not tokens:
                    first = perf_counter()
                tokens.append(int(token))
            end = perf_counter()
            at = first_difference(ours, tokens)
            gap = None if at is None else self._gap([*prompt, *tokens[:at]])
        finally:
            mx.set_cache_limit(limit)
            mx.clear_cache()
        return PeerRun(
            task,
            repeat,
            decode_speed(len(tokens), end - first),
            first - start,
            token_sha256(tokens),
            at,
            gap,
        )

    def _failed(self, what: str, error: Exception) -> PeerError:
        words = " ".join(str(error).split()) or "no reason given"
        kind = type(error).__name__
        return PeerError(f"--against {NAME}: {NAME} {self.version} {what}: {kind}: {words}")

    def _gap(self, tokens: list[int]) -> float:
        """How much better than the second token the first one is after `tokens`, in nats."""
        import mlx.core as mx

        logits = np.array(self._model(mx.array([tokens]))[0, -1].astype(mx.float32))
        second, first = np.sort(logits)[-2:]
        return float(first - second)


def peer_version() -> str:
    """The version of mlx-lm; PeerError where it cannot be imported."""
    _load_model()
    return metadata.version(NAME)


def _load_model() -> Any:
    try:
        from mlx_lm.utils import load_model
    except ImportError as error:
        raise PeerError(
            f"--against {NAME}: {NAME} cannot be imported ({error}): pip install 'specdec[peer]'"
        ) from error
    return load_model
