"""Peer: mlx-lm on the same files, in the same process and taking turns with ours."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from scripts.gpu.watch import operations, summary

WARM = 2  # tokens of a turn that are not timed: its loop computes one ahead


class Peer:
    """Decoding by mlx-lm's own loop, and forwards of several rows behind the same prompt."""

    def __init__(self, folder: Path, prompt: Sequence[int], most: int) -> None:
        """most: tokens to be decoded, in all."""
        self._model, _ = load_model(folder)
        mx.eval(self._model.parameters())
        self._tokens = generate_step(mx.array(list(prompt)), self._model, max_tokens=most)
        next(self._tokens)
        self._cache = make_prompt_cache(self._model)
        mx.eval(self._model(mx.array(list(prompt))[None], cache=self._cache))
        self._rng = np.random.default_rng(0)

    def decode(self, count: int) -> float:
        """Seconds a token; it decodes WARM tokens more."""
        times = [perf_counter() for _ in islice(self._tokens, WARM + count)]
        return (times[-1] - times[WARM - 1]) / count

    def forward(self, rows: int) -> float:
        """Seconds of a forward of so many rows, until its logits are there."""
        tokens = mx.array(self._rng.integers(0, 256, (1, rows)))
        mx.eval(tokens)
        begin = perf_counter()
        mx.eval(self._model(tokens, cache=self._cache))
        return perf_counter() - begin

    def operations(self) -> dict[str, Any]:
        """Of a forward of one row."""
        return summary(operations(self._model(mx.array([[1]]), cache=self._cache)))
