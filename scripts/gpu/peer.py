"""Peer: mlx-lm on the same files, in the same process and taking turns with ours."""

import statistics
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from scripts.gpu.watch import operations, summary

WARM = 2  # tokens of a turn that are not timed, as its loop computes one ahead; forwards of a size


class Peer:
    """Decoding by mlx-lm's own loop, and forwards of several rows behind the same prompt."""

    def __init__(self, folder: Path, prompt: Sequence[int], count: int) -> None:
        """count: tokens to be timed, in all."""
        # here, as the one who guards this is to hear of it where there is no mlx-lm
        from mlx_lm.generate import generate_step
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        self._model, _ = load_model(folder)
        mx.eval(self._model.parameters())
        self._tokens = generate_step(
            mx.array(list(prompt)), self._model, max_tokens=1 + (1 + WARM) * count
        )
        next(self._tokens)
        self._cache = make_prompt_cache(self._model)
        mx.eval(self._model(mx.array(list(prompt))[None], cache=self._cache))
        self._rng = np.random.default_rng(0)

    def turn(self, count: int, rows: Sequence[int]) -> dict[str, Any]:
        """Milliseconds of a token, "mlx_lm", and of forwards by rows, "forward"."""
        token = self.decode(count) * 1e3
        return {"mlx_lm": token, "forward": {n: self.forward(n) * 1e3 for n in rows}}

    def decode(self, count: int) -> float:
        """Seconds a token; it decodes WARM tokens more."""
        times = [perf_counter() for _ in islice(self._tokens, WARM + count)]
        return (times[-1] - times[WARM - 1]) / count

    def forward(self, rows: int) -> float:
        """Seconds of a forward of so many rows behind another such, until its logits are there."""
        for _ in range(WARM):
            tokens = mx.array(self._rng.integers(0, 256, (1, rows)))
            mx.eval(tokens)
            begin = perf_counter()
            mx.eval(self._model(tokens, cache=self._cache))
            spent = perf_counter() - begin
        return spent

    def operations(self) -> dict[str, Any]:
        """Of a forward of one row."""
        return summary(operations(self._model(mx.array([[1]]), cache=self._cache)))


class GuardedPeer:
    """mlx-lm, whose errors are told and cost no figure of ours."""

    def __init__(self, folder: Path, prompt: Sequence[int], count: int) -> None:
        self._peer: Any = None
        self._peer = self._or_none(lambda: Peer(folder, prompt, count))

    def _or_none(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            print(f"mlx-lm: {type(error).__name__}: {error}")
            self._peer = None
            return None

    def turn(self, count: int, rows: Sequence[int]) -> dict[str, Any]:
        """Milliseconds of a token, and of forwards; nothing after an error."""
        peer = self._peer
        if peer is None:
            return {}
        return self._or_none(lambda: peer.turn(count, rows)) or {}

    def figures(self, turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Medians, and the ratio of decoding."""
        both, peer = [turn for turn in turns if "mlx_lm" in turn], self._peer
        if not both or peer is None:
            return {}
        forwards = {n: [turn["forward"][n] for turn in both] for n in both[0]["forward"]}
        return {
            "mlx_lm": {
                "tokens_per_second": 1e3 / statistics.median(t["mlx_lm"] for t in both),
                "ratio": statistics.median(t["mlx_lm"] / t["decode"][0] for t in both),
                "forward_ms": {n: statistics.median(ms) for n, ms in forwards.items()},
                "operations": self._or_none(peer.operations),
            }
        }
