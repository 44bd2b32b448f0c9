"""Peer: mlx-lm on the same checkpoint within the same memory, against the engine.

Every engine runs in a process of its own (player.py says how each is held to the limit), and they
take turns. The limit is what the engine's own process was seen to hold with a quarter of the
experts in memory; all decode the same text with the same experts.
"""

import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.streaming.checkpoint import Folders
from scripts.streaming.trace import Trace
from specdec.units import table


class Player:
    """A process that decodes on demand; `failed` says why it does not."""

    def __init__(self, engine: str, folder: Path, trace: Path, limit: int) -> None:
        command = [sys.executable, "-m", "scripts.streaming.player", engine, str(folder)]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        self._process = subprocess.Popen(
            [*command, str(trace), str(limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.failed: str | None = None
        self._answer()

    def play(self, first: int, tokens: int) -> dict[str, Any] | None:
        """Figures of one run; None when the process is over."""
        if self.failed is not None:
            return None
        assert self._process.stdin is not None
        print(first, tokens, file=self._process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        self._errors.close()

    def _answer(self) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        end = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self.failed = f"{end}: {said[-1]}" if said else end
        return None


def run(
    folders: Folders,
    trace: Trace,
    starts: Sequence[int],
    tokens: int,
    prefetch: str,
    gb: float | None,
) -> dict[str, Any]:
    """starts: where in the trace each repeat begins. prefetch: the engine's. gb: limit in
    10^9 bytes, None for what the engine holds."""
    print(f"\n== peer: {tokens} tokens, {len(starts)} repeats, medians")
    with tempfile.TemporaryDirectory() as place:
        file = trace.save(Path(place) / "trace.npz")
        ours = f"specdec-{prefetch}"
        players = {ours: Player(ours, folders.repacked, file, 0)}
        seen = players[ours].play(starts[0] // 2, tokens)
        assert seen is not None, players[ours].failed
        limit = int(seen["memory"] if gb is None else gb * 1e9)
        for engine in ("mapped", "shipped", "resident"):
            bound = 0 if engine == "resident" else limit
            players[engine] = Player(engine, folders.model, file, bound)
        runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in players}
        for first in starts:
            for engine, player in players.items():
                if (done := player.play(first, tokens)) is not None:
                    runs[engine].append(done)
        for player in players.values():
            player.close()
    base = [one["rate"] for one in runs[ours]]
    figures: dict[str, Any] = {"limit": limit, "engines": {}}
    rows: list[tuple[str, ...]] = [
        ("engine", "limit GB", "tok/s", "specdec / it", "MB/token", "holds GB")
    ]
    for engine, all_of in runs.items():
        name = "specdec" if engine == ours else f"mlx-lm, {engine}"
        held = "none" if engine == "resident" else f"{limit / 1e9:.2f}"
        if not all_of or players[engine].failed:
            figures["engines"][name] = {"failed": players[engine].failed}
            rows.append((name, held, "does not run", "", "", ""))
            continue
        middle = {key: statistics.median(one[key] for one in all_of) for key in all_of[0]}
        ratio = statistics.median(a / one["rate"] for a, one in zip(base, all_of, strict=True))
        figures["engines"][name] = {**middle, "ratio": ratio}
        cells = (middle["rate"], ratio, middle["bytes"] / 1e6, middle["memory"] / 1e9)
        rows.append((name, held, *(f"{cell:.2f}" for cell in cells)))
    print(table(rows))
    for engine, player in players.items():
        if player.failed is not None:
            print(f"{engine}: {player.failed}")
    return figures
