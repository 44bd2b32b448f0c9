"""Every GPU kernel against its reference on this machine's GPU: errors, and rows in any company.

    python -m scripts.gpu.check                     # the GPU, real geometry and odd sizes
    python -m scripts.gpu.check --only tree_attention mix_tree
    python -m scripts.gpu.check --shim              # the CPU runs the kernels' text; tiny sizes
    python -m scripts.gpu.check --plain             # the reference against itself; tiny sizes

Each group of kernels runs in a process of its own: one that does not compile, or that ends the
process, hides nothing of the others. The exit code is 1 if anything failed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from scripts.gpu.case import Finding, check
from scripts.gpu.cases import groups
from scripts.gpu.chip import about
from scripts.gpu.geometry import REAL
from specdec.kernels.executor import gpu_kernels
from specdec.kernels.gpu.limits import refused
from specdec.units import table

# Reduced precision of MLX's own products would blur the reference on a GPU.
ENVIRONMENT = {"MLX_ENABLE_TF32": "0", "PYTHONUNBUFFERED": "1"}


def run_group(name: str, tiny: bool, kernels: bool, report: Path) -> None:
    """Check the cases of a group, writing each finding as a line as soon as it is there."""
    mx.random.seed(sum(name.encode()))
    with report.open("w") as file, gpu_kernels(kernels):
        for make in groups(REAL, tiny)[name]():
            known, case = len(refused), None
            try:
                case = make()
                finding = check(case, strict=kernels)
                if len(refused) > known:
                    finding.note = "refused: " + "; ".join(list(refused)[known:])
                    finding.failure = finding.failure or ("refused" if case.real else "")
            except Exception as error:  # the next case may still be told
                finding = Finding(name, "", "", failure=_words(error))
                if case is not None:
                    kind = str(case.dtype).removeprefix("mlx.core.")
                    finding.shape, finding.dtype = case.shape, kind
            file.write(json.dumps(asdict(finding)) + "\n")
            file.flush()


def _words(error: Exception) -> str:
    """The first lines that say something: a compiler's errors, or the last of the message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    wrong = [line for line in lines if re.search(r"\berror\b", line, re.I)]
    return f"{type(error).__name__}: " + "\n    ".join((wrong or lines)[:4])


def spawn(name: str, args: argparse.Namespace, folder: Path) -> list[Finding]:
    """A group in its own process."""
    report = folder / f"{name}.jsonl"
    flags = [flag for flag in ("shim", "plain") if getattr(args, flag)]
    command = [sys.executable, "-m", "scripts.gpu.check", "--child", name, "--report", str(report)]
    try:
        done = subprocess.run(
            [*command, *(f"--{flag}" for flag in flags)],
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=args.timeout,
        )
        ended = "" if done.returncode == 0 else f"ended with {done.returncode}"
        said = done.stdout
    except subprocess.TimeoutExpired as error:
        ended, said = f"not done after {args.timeout} s", ""
        if error.stdout:
            said = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout
    lines = report.read_text().splitlines() if report.exists() else []
    findings = [Finding(**json.loads(line)) for line in lines]
    if ended:
        last = "\n    ".join(said.strip().splitlines()[-6:])
        findings.append(Finding(name, "the process", "", failure=f"{ended}: {last}"))
    print(f"{name}: {len(findings)} cases, {sum(not f.ok for f in findings)} failed", flush=True)
    return findings


def tell(findings: Sequence[Finding]) -> None:
    """The table, then what failed in full."""
    rows = [("kernel", "shape", "dtype", "error", "invariant", "first s", "")]
    for f in findings:
        invariant = {None: "-", True: "yes", False: "NO"}[f.invariant]
        verdict = "ok" if f.ok and not f.note else (f.note[:40] if f.ok else "FAILED")
        shape = f.shape if len(f.shape) < 60 else f.shape[:57] + "..."
        rows.append(
            (f.op, shape, f.dtype, f"{f.error:.1e}", invariant, f"{f.seconds:.2f}", verdict)
        )
    print(table(rows))
    for f in findings:
        if not f.ok:
            why = f.failure or "not row-invariant"
            print(f"FAILED {f.op} {f.shape} {f.dtype}: {why} {f.note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="groups")
    parser.add_argument("--shim", action="store_true", help="run the kernels' text on the CPU")
    parser.add_argument("--plain", action="store_true", help="no kernels: try out this script")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--timeout", type=int, default=420, help="seconds of one process")
    parser.add_argument("--out", type=Path, help="write the findings as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    tiny = args.shim or args.plain
    if args.child:
        shim: Any = nullcontext()
        if args.shim:
            from tests.metal.run import through_shim

            shim = through_shim()
        with shim:
            run_group(args.child, tiny, not args.plain, args.report)
        return
    names = list(groups(REAL, tiny))
    if args.plain:
        names = [n for n in names if n not in ("samples", "rounds")]  # they have no other form
    names = args.only or names
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        found = pool.map(lambda name: spawn(name, args, Path(folder)), names)
        findings = [finding for of_group in found for finding in of_group]
    tell(findings)
    failed = sum(not finding.ok for finding in findings)
    worst = {f.dtype: max(g.error for g in findings if g.dtype == f.dtype) for f in findings}
    print(f"{len(findings)} cases, {failed} failed; greatest errors {worst}")
    print(about())
    if args.out:
        document = {"about": about(), "findings": [asdict(f) | {"ok": f.ok} for f in findings]}
        args.out.write_text(json.dumps(document, indent=1))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
