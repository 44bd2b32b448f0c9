"""Speed of streaming experts from disk: reads, residency, speculation, and mlx-lm. Prints ratios.

    python -m scripts.bench_streaming --json figures.json
    python -m scripts.bench_streaming --parts reads,residency --repeats 5
    python -m scripts.bench_streaming --tiny       # seconds, to try it out

`reads` the engine's reader against a bare loop; `residency` decoding with 50, 25 and 12.5 % of the
experts in memory, with each way of prefetching; `speculation` budgets against plain decoding there;
`peer` mlx-lm at the same memory. All reads go past the page cache.

The checkpoint has Qwen3.6-35B-A3B's geometry with fewer layers, and random weights; it is written
to --folder (8.8 GB with its repacked copy) unless it is there. The router is led along a trace
whose LRU hit rates are 0.89, 0.67 and 0.45 at those shares (scripts/streaming/trace.py), or random.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from scripts.streaming import checkpoint, peer, reads, residency, speculation
from scripts.streaming.run import PROMPT
from scripts.streaming.trace import Shape, Trace, local_trace, random_trace
from specdec.kernels.array import choose_backend
from specdec.metrics import peak_process_bytes
from specdec.target.streaming import PREFETCH, QUEUE_DEPTH

PARTS = ("reads", "residency", "speculation", "peer")
BEFORE = 400  # tokens of the trace before the first run: what slots and tables hold


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(one) for one in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=_list(str), default=list(PARTS), help="comma-separated")
    parser.add_argument("--folder", type=Path, help="of the checkpoint")
    parser.add_argument("--layers", type=int, help="of the checkpoint; 8, or 4 if tiny")
    parser.add_argument("--tiny", action="store_true", help="a tiny geometry, which says nothing")
    parser.add_argument("--tokens", type=int, default=32, help="of each run")
    parser.add_argument("--speculation-tokens", type=int, default=48, help="of part speculation")
    parser.add_argument("--peer-tokens", type=int, default=8, help="of each run of part peer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shares", type=_list(float), default=[1, 0.5, 0.25, 0.125])
    parser.add_argument("--budgets", type=_list(int), default=[2, 4, 6, 12])
    parser.add_argument("--prefetch", type=_list(str), default=["off", "draft", "layer", "auto"])
    parser.add_argument("--speculation-prefetch", default="off", choices=PREFETCH)
    parser.add_argument("--depth", type=int, default=QUEUE_DEPTH, help="reads under way at most")
    parser.add_argument("--depths", type=_list(int), default=[1, 2, 4, 8, 16], help="of part reads")
    parser.add_argument("--experts", type=int, default=128, help="read at once in part reads")
    parser.add_argument("--peer-gb", type=float, help="limit of part peer; what specdec took")
    parser.add_argument("--json", type=Path, help="write the figures")
    args = parser.parse_args()
    for name, found, known in (("parts", args.parts, PARTS), ("prefetch", args.prefetch, PREFETCH)):
        if not set(found) <= set(known):
            parser.error(f"--{name} {','.join(found)}: expected some of {','.join(known)}")
    if 1 not in args.shares:
        parser.error("--shares: expected 1 among them, which the others are held against")
    return args


def describe(trace: Trace) -> dict[str, Any]:
    """What is known of the local trace, printed."""
    edges = trace.shape.edges[1:4]
    about: dict[str, Any] = {
        "hit_rates": {depth: trace.hit_rate(depth, BEFORE // 2) for depth in edges},
        "distinct_of_8": trace.distinct(8),
        "repeated": trace.repeated(),
        "band_shares": trace.shares,
    }
    rates = ", ".join(f"{rate:.3f} of {depth}" for depth, rate in about["hit_rates"].items())
    print(
        f"trace: LRU hit rates {rates} of {trace.shape.experts} experts; 8 tokens use "
        f"{about['distinct_of_8']:.1f} distinct ones; a token shares {about['repeated']:.0%} with "
        "the one before"
    )
    return about


def main() -> None:
    """Run the parts that were asked for."""
    args = arguments()
    layers = args.layers or (4 if args.tiny else 8)
    name = f"specdec-streaming-{'tiny' if args.tiny else 'real'}-{layers}"
    folders = checkpoint.prepare(
        args.folder or Path(tempfile.gettempdir()) / name, layers, args.tiny
    )
    about = checkpoint.geometry(layers, args.tiny)
    shape = Shape(layers, about.num_experts, about.num_experts_per_tok, about.vocab_size)
    # a round may commit a whole block, and auto learns for some rounds before it is measured
    most = max(args.tokens, args.peer_tokens, args.speculation_tokens * speculation.LONGER)
    stretch = PROMPT + most + (speculation.LEARNING + 2) * checkpoint.BLOCK
    starts = [BEFORE + repeat * stretch for repeat in range(args.repeats)]
    length = BEFORE + args.repeats * stretch + 1
    local = local_trace(shape, length)
    backend = choose_backend(mx.bfloat16)
    print(f"{layers} layers, backend {backend.name} in {backend.dtype}: {backend.why}")
    figures: dict[str, Any] = {
        "geometry": asdict(about),
        "backend": backend.name,
        "dtype": str(backend.dtype),
        "trace": describe(local),
    }
    for part in args.parts:
        if part == "reads":
            figures[part] = reads.run(folders, args.depths, args.repeats, args.experts)
        elif part == "residency":
            traces = {"local": local, "random": random_trace(shape, length)}
            bandwidth = figures.get("reads", {}).get("bandwidth")
            figures[part] = residency.run(
                folders,
                traces,
                starts,
                args.shares,
                args.prefetch,
                args.tokens,
                args.depth,
                bandwidth,
            )
        elif part == "speculation":
            figures[part] = speculation.run(
                folders,
                local,
                starts,
                args.shares,
                args.budgets,
                args.speculation_prefetch,
                args.speculation_tokens,
                args.depth,
            )
        else:
            figures[part] = peer.run(
                folders, local, starts, args.peer_tokens, args.prefetch[0], args.peer_gb
            )
    figures["peak_memory"] = peak_process_bytes()
    print(f"\npeak memory of this process: {figures['peak_memory'] / 1e9:.1f} GB")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
