"""The benchmark of whole processes runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.pairs import write_pair

ROOT = Path(__file__).parents[2]


def test_it_prints_the_start_and_the_peak(tmp_path):
    pair = write_pair(tmp_path)
    command = [sys.executable, str(ROOT / "scripts/bench_start.py"), "--repeat", "1"]
    done = subprocess.run(
        [*command, *pair.options, "--max-tokens", "4", "--pin-layers", "2"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^first token after \d+\.\d\d s \(median of \d", done.stdout, re.MULTILINE)
    assert re.search(r"^peak .* MB, planned .* MB: \d+\.\d %$", done.stdout, re.MULTILINE)
