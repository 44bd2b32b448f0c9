"""Speed of the GPU kernels: each by itself, a whole model of real geometry, the demo pair.

    python -m scripts.gpu.bench kernels model demo --out figures.json
    python -m scripts.gpu.bench model --layers 8 --folder /tmp/model
    python -m scripts.gpu.bench --small kernels model demo      # to try it out, on any machine
    python -m scripts.gpu.bench --small --shim kernels model    # with the kernels' text, on a CPU

Each part runs in a process of its own, prints its table and its bars, and hides nothing of the
others when it fails. `model` writes its random checkpoint to --folder (19.5 GB) if it is not there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx

from scripts.gpu.chip import about, on_gpu
from scripts.gpu.geometry import REAL, TINY, write_model
from specdec.mlx_environment import DEFAULTS

PARTS = ("kernels", "model", "demo")
ROWS = [1, 2, 4, 7, 8, 16, 32]
BUDGETS = [1, 2, 4, 6, 8, 12, 16, 24]


def run_part(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one part, in this process."""
    geometry = TINY if args.small else REAL
    if args.layers:
        geometry = replace(geometry, num_hidden_layers=args.layers)
    few = args.small
    if part == "kernels":
        from scripts.gpu import bench_kernels

        kernels, repeats = on_gpu() or args.shim, 1 if few else args.repeats
        return bench_kernels.run(geometry, args.rows, repeats, kernels)
    if part == "model":
        from scripts.gpu import bench_model

        folder = args.folder / f"{geometry.hidden_size}x{geometry.num_hidden_layers}"
        if not (folder / "model.safetensors.index.json").exists():
            write_model(folder, geometry)
        tokens, repeats = (4, 2) if few else (args.tokens, args.repeats * 2)
        return bench_model.run(folder, args.rows, tokens, repeats, args.shim, not args.no_peer)
    from scripts.gpu import bench_demo

    prompts, count, total = (2, 16, 68) if few else (args.prompts, args.tokens * 2, args.compare)
    return bench_demo.run([1, 4] if few else args.budgets, prompts, count, total, args.shim)


def _compile(command: list[str], rows: list[int]) -> None:
    """Fill MLX's cache of compiled kernels on all cores: one process would take minutes."""
    start = perf_counter()
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def warm(which: int, rows: int) -> None:
        options = ["--warm", str(which), "--rows", str(rows)]
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([*command, *options], timeout=150, **quiet)  # type: ignore[call-overload]

    jobs = [(which, n) for n in sorted(rows, reverse=True) for which in (6, 8, *range(6), 7, 9, 10)]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        list(pool.map(warm, *zip(*jobs, strict=True)))
    print(f"compiled in {perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="write all figures as JSON")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "specdec-bench"
    )
    parser.add_argument("--layers", type=int, help="of the model")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="decoded a measurement")
    parser.add_argument("--no-peer", action="store_true", help="without mlx-lm")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--prompts", type=int, default=8, help="of the demo's sweep")
    parser.add_argument("--compare", type=int, default=10200, help="tokens held to be equal")
    parser.add_argument("--small", action="store_true", help="tiny sizes and counts")
    parser.add_argument("--shim", action="store_true", help="run the kernels' text on the CPU")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.warm is not None:
        from scripts.gpu import bench_kernels

        bench_kernels.warm(TINY if args.small else REAL, args.rows, args.warm)
        return
    if args.child:
        shim: Any = nullcontext()
        if args.shim:
            from tests.metal.run import through_shim

            os.environ["SPECDEC_KERNELS"] = "reference"  # on MLX arrays

            shim = through_shim()
        with shim:
            figures = run_part(args.parts[0], args)
        args.child.write_text(json.dumps(figures))
        return
    document: dict[str, Any] = {"about": about()}
    options = [word for word in sys.argv[1:] if word not in PARTS]
    failed = compiled = False
    with tempfile.TemporaryDirectory() as scratch:
        for part in args.parts:
            print(f"\n== {part}", flush=True)
            file = Path(scratch) / f"{part}.json"
            # As specdec tells MLX; but kernels alone are timed in long graphs, before which the
            # host may run ahead.
            graphs = {"MLX_USE_CUDA_GRAPHS": "1", "MLX_MAX_OPS_PER_BUFFER": "1000"}
            told = {**DEFAULTS, **os.environ, **(graphs if part == "kernels" else {})}
            command = [sys.executable, "-m", "scripts.gpu.bench", part, *options]
            if part in ("kernels", "model") and mx.cuda.is_available() and not compiled:
                _compile([*command[:3], "kernels", *options], args.rows)
                compiled = True
            done = subprocess.run(
                [*command, "--child", str(file)],
                env={"PYTHONUNBUFFERED": "1", **told},
            )
            if done.returncode or not file.exists():
                print(f"FAILED {part}: ended with {done.returncode}")
                failed = True
            else:
                document[part] = json.loads(file.read_text())
            if args.out:
                args.out.write_text(json.dumps(document, indent=1))
    print(about())
    sys.exit(failed)


if __name__ == "__main__":
    main()
