"""Where a pass's time goes on an NVIDIA GPU: each kernel's on the device, each call's of CUDA.

Kineto, which PyTorch carries, hears of the kernels of all libraries in a process; so PyTorch is
needed, and used for nothing else.

    python -m scripts.gpu.profile --folder FOLDER --rows 0 1 7
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.gpu import bench_model
from specdec.budget import Fixed
from specdec.choose import greedy
from specdec.mlx_environment import tell_mlx
from specdec.units import table

PASSES = 16


def passes(engine: Any, rows: int) -> Callable[[], Any]:
    """Verify passes over a chain of so many rows; 0: steps of plain decoding."""
    if rows == 0:
        return lambda: engine.step(Fixed(1))
    tree = bench_model.tree_of(rows, True, engine.target.config.vocab_size)
    return lambda: greedy(engine.target.verify(tree).logits)


def profile(what: str, once: Callable[[], Any]) -> None:
    """Print the table of PASSES calls."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watched

    for _ in range(3):
        once()
    with watched(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        for _ in range(PASSES):
            once()
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    spans = []
    for event in found.profiler.kineto_results.events():
        device = "device" if "CUDA" in str(event.device_type()) else "host"
        times[device, event.name()[:60]].append(event.duration_ns() / 1e3)
        if device == "device":
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
    spans.sort()
    busy, end = 0, 0
    for first, last in spans:
        busy += max(0, last - max(first, end))
        end = max(end, last)
    lines = [("where", "what", "a pass", "us each", "us a pass")]
    for (device, name), all_us in sorted(times.items(), key=lambda one: -sum(one[1]))[:30]:
        total = sum(all_us) / PASSES
        each = sum(all_us) / len(all_us)
        counts = f"{len(all_us) / PASSES:.1f}", f"{each:.1f}", f"{total:.0f}"
        lines.append((device, name, *counts))
    wall = (spans[-1][1] - spans[0][0]) / 1e3 / PASSES if spans else 0
    print(f"{what}: device busy {busy / 1e3 / PASSES:.0f} of {wall:.0f} us a pass")
    print(table(lines), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of `scripts.gpu.bench model`")
    parser.add_argument("--rows", type=int, nargs="+", default=[0, 1, 7])
    args = parser.parse_args()
    tell_mlx()
    engine = bench_model.load(args.folder, kernels=False)
    prompt = list(range(bench_model.PROMPT))
    engine.prefill(prompt)
    for rows in args.rows:
        profile(f"{rows} rows" if rows else "decoding", passes(engine, rows))


if __name__ == "__main__":
    main()
