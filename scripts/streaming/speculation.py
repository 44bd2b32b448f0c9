"""Speculation while streaming: for each residency plain decoding, fixed budgets, and the tool's own
choice, with what each reads for a committed token.

The draft is random and its work real; what it proposes agrees with the text as rig.py says. With a
share of 1 all experts are in memory.
"""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any

from scripts.streaming.checkpoint import Folders
from scripts.streaming.rig import Rig, Setting
from scripts.streaming.run import SETTLE, Run, measure, summary
from scripts.streaming.trace import Trace
from specdec.budget import Budget, Fixed
from specdec.target.streaming import Streaming
from specdec.units import table

AUTO = "auto"
LEARNING = 16  # rounds before the clock starts in which auto learns costs and draft
LONGER = 2  # auto's texts, by the others': it tries drafts now and then
TOLERANCE = 0.05  # what trying drafts may cost a short text, and noise


def run(
    folders: Folders,
    trace: Trace,
    starts: Sequence[int],
    shares: Sequence[float],
    budgets: Sequence[int],
    mode: str,
    tokens: int,
    depth: int,
) -> dict[str, Any]:
    """budgets: fixed ones beside 1 and auto. mode: of prefetching."""
    print(f"\n== speculation: {tokens} tokens, {len(starts)} repeats, prefetch {mode}, medians")
    names: list[int | str] = [1, *budgets, AUTO]
    runs: dict[tuple[float, int | str], list[Run]] = {}
    with ExitStack() as stack:
        how = Streaming(direct=True, queue_depth=depth, prefetch=mode)
        rigs: dict[float, Rig] = {}
        for share in shares:
            setting, like = Setting(share, how, max(budgets)), next(iter(rigs.values()), None)
            rig = Rig(folders.repacked, setting, folders.draft, like)
            rigs[share] = stack.enter_context(closing(rig))
        for first in starts:
            for share, rig in rigs.items():
                for name in names:
                    budget: Budget = Fixed(name) if isinstance(name, int) else _auto(rig, budgets)
                    settle = LEARNING if name == AUTO else SETTLE
                    count = tokens * LONGER if name == AUTO else tokens
                    done = measure(rig, trace, first, budget, count, name != 1, settle)
                    runs.setdefault((share, name), []).append(done)
    figures: dict[str, Any] = {"prefetch": mode, "settings": []}
    rows: list[tuple[str, ...]] = [
        ("in memory", "budget", "tok/s", "of plain", "acceptance", "MB/token", "hits", "waiting")
    ]
    for (share, name), all_of in runs.items():
        one = summary(all_of, runs[share, 1])
        figures["settings"].append({"share": share, "budget": name, **asdict(one)})
        rows.append(
            (
                f"{share:.1%}",
                "plain" if name == 1 else str(name),
                f"{one.rate:.2f}",
                f"{one.rate_share:.2f}",
                f"{one.acceptance:.2f}",
                f"{one.bytes / 1e6:.1f}",
                f"{one.hit_rate:.3f}",
                f"{one.stall_seconds * 1e3:.1f}",
            )
        )
    print(table(rows))
    chosen = [one for one in figures["settings"] if one["budget"] == AUTO]
    worst = min(one["rate_share"] for one in chosen)
    figures["met"] = worst >= 1 - TOLERANCE
    print(
        f"BAR what the tool chooses (auto) loses nothing to plain decoding: {worst:.2f} at worst, "
        f"at least {1 - TOLERANCE}: {'met' if figures['met'] else 'NOT MET'}"
    )
    return figures


def _auto(rig: Rig, budgets: Sequence[int]) -> Budget:
    """The engine's own, which keeps what it learned of costs from text to text."""
    auto = rig.engine.auto(max(budgets))
    auto.begin()
    return auto
