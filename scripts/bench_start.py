"""Measures whole processes: from their start to the first byte of text, and memory against plan.

    python scripts/bench_start.py               # the demo pair, three processes after one

Prints medians. Other options go to `specdec generate`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from specdec.units import percent, size

PROMPT = ("--prompt", "def main():\n", "--raw")


def once(options: Sequence[str], path: Path) -> tuple[float, dict[str, Any]]:
    """Seconds to the first byte on stdout, and the document of the run."""
    command = [sys.executable, "-m", "specdec", "generate", *PROMPT, "--json", str(path), *options]
    start = perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = perf_counter() - start
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return seconds, json.loads(path.read_text())


def main() -> None:
    """Run the processes one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=3, help="processes that count")
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        once(options, path)  # reads the files into the page cache, compiles
        runs = [once(options, path) for _ in range(args.repeat)]
    seconds = [one for one, _ in runs]
    told = ", ".join(f"{one:.2f}" for one in seconds)
    print(f"first token after {statistics.median(seconds):.2f} s (median of {told})")
    peak = statistics.median(document["memory"]["process"] for _, document in runs)
    planned = runs[0][1]["memory"]["planned"]
    print(f"peak {size(peak)}, planned {size(planned)}: {percent(peak / planned)}")


if __name__ == "__main__":
    main()
