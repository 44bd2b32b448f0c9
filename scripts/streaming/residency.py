"""Residency: decoding with a part of the experts in memory, against all of them.

Every setting decodes the same stretch of the same text, slots warm at its beginning. What of the
full speed is possible: a token computes for as long as with all experts in memory, and reads its
bytes at the speed the reader reached; with perfect overlap the longer of the two is left.
"""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from scripts.streaming.checkpoint import Folders
from scripts.streaming.rig import Rig, Setting
from scripts.streaming.run import Run, measure, summary
from scripts.streaming.trace import Trace
from specdec.budget import Fixed
from specdec.kernels.array import evaluate
from specdec.kernels.linear import linear
from specdec.target.streaming import PREFETCH, Streaming
from specdec.target.trial import TURNS, WINDOW
from specdec.units import table

BARS = {0.5: 0.70, 0.25: 0.50, 0.125: 0.35}  # of the resident speed, with locality
AUTO = "auto"
TRIAL = WINDOW * TURNS * len(PREFETCH[1:])  # passes after which auto has decided
Key = tuple[float, str, str]  # share, routing, prefetch


def run(
    folders: Folders,
    traces: dict[str, Trace],
    starts: Sequence[int],
    shares: Sequence[float],
    modes: Sequence[str],
    tokens: int,
    depth: int,
    bandwidth: float | None,
) -> dict[str, Any]:
    """traces: by name, "local" among them. starts: where in them each repeat begins. shares: of the
    experts in memory, 1 among them. modes: of prefetching, those after the first with locality
    alone. bandwidth: bytes per second that the reader reaches; None for the most of these runs."""
    print(f"\n== residency: {tokens} tokens, {len(starts)} repeats, depth {depth}, direct, medians")
    runs: dict[Key, list[Run]] = {}
    with ExitStack() as stack:
        how = Streaming(direct=True, queue_depth=depth, prefetch=modes[0])
        rigs: dict[float, Rig] = {}
        for share in shares:
            like = next(iter(rigs.values()), None)
            rig = Rig(folders.repacked, Setting(share, how), like=like)
            rigs[share] = stack.enter_context(closing(rig))
        head = _head_seconds(rigs[shares[0]])
        local = traces["local"]
        settings = [
            (share, name, mode)
            for share in shares
            for name in traces
            for mode in modes
            if mode == modes[0] or (share < 1 and name == "local")
        ]
        for share, _, mode in settings:
            if mode == AUTO:  # let it come to its verdict, on a text before
                rigs[share].prefetch(mode)
                measure(rigs[share], local, starts[0] // 2, Fixed(1), 1, settle=TRIAL)
        verdicts = {}
        for first in starts:
            for share, name, mode in settings:
                rigs[share].prefetch(mode)
                done = measure(rigs[share], traces[name], first, Fixed(1), tokens)
                runs.setdefault((share, name, mode), []).append(done)
                if mode == AUTO:
                    said = rigs[share].target.prefetcher.use().words
                    verdicts[f"{share:.1%}"] = list(said)
    figures = _tell(runs, head, bandwidth)
    for share_of, words in verdicts.items():
        print(f"prefetch auto at {share_of}: {'; '.join(words) or 'no verdict'}")
    return {**figures, "prefetch_auto": verdicts}


def _head_seconds(rig: Rig) -> float:
    """What the vocabulary's head takes of a token: with few layers it is a large part."""
    target = rig.target
    x = np.ones((1, target.config.hidden_size), np.float32)
    hidden = x if rig.backend.name == "cpu" else mx.array(x).astype(rig.backend.dtype)
    seconds = []
    for _ in range(5):
        begin = perf_counter()
        evaluate(linear(hidden, target.head, target.norm))
        seconds.append(perf_counter() - begin)
    return statistics.median(seconds)


def _tell(runs: dict[Key, list[Run]], head: float, bandwidth: float | None) -> dict[str, Any]:
    full = {name: runs[key] for key in runs for share, name, _ in [key] if share == 1}
    found = {key: summary(all_of, full[key[1]]) for key, all_of in runs.items()}
    if bandwidth is None:
        bandwidth = max(one.bandwidth for one in found.values()) or 1.0
    rows: list[tuple[str, ...]] = [
        (
            *("in memory", "routing", "prefetch", "tok/s", "of full", "bar", "possible"),
            *("without head", "hits", "MB/token", "ms/token", "waiting", "GB/s"),
        )
    ]
    figures: dict[str, Any] = {"head_seconds": head, "bandwidth": bandwidth, "settings": []}
    for (share, name, mode), one in found.items():
        base = found[1, name, next(m for s, n, m in found if s == 1 and n == name)]
        best = base.seconds / max(base.seconds, one.bytes / bandwidth)
        headless = (base.seconds - head) / (one.seconds - head)
        bar = BARS.get(share) if name == "local" else None
        met = None if bar is None else one.rate_share >= bar
        figures["settings"].append(
            {
                "share": share,
                "routing": name,
                "prefetch": mode,
                **asdict(one),
                "possible": best,
                "limit": "bandwidth" if best < 1 else "computing",
                "without_head": headless,
                "bar": bar,
                "met": met,
            }
        )
        rows.append(
            (
                f"{share:.1%}",
                name,
                mode,
                f"{one.rate:.2f}",
                f"{one.rate_share:.2f}",
                "" if bar is None else f"{bar:.2f} {'met' if met else 'NOT MET'}",
                f"{best:.2f}",
                f"{headless:.2f}",
                f"{one.hit_rate:.3f}",
                f"{one.bytes / 1e6:.1f}",
                f"{one.seconds * 1e3:.1f}",
                f"{one.stall_seconds * 1e3:.1f}",
                f"{one.bandwidth / 1e9:.2f}",
            )
        )
    print(table(rows))
    print(
        f"possible: computing as with all experts in memory, reads at {bandwidth / 1e9:.2f} GB/s, "
        f"overlapped perfectly; the head takes {head * 1e3:.1f} ms of every token"
    )
    return figures
