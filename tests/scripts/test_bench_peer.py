"""The benchmark against mlx-lm runs, and both emit the same tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pairs import write_pair

ROOT = Path(__file__).parents[2]


def test_every_section_runs(tmp_path):
    pytest.importorskip("mlx_lm")
    pair = write_pair(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    line = {"id": "a", "class": "python", "prompt": "the rain in spain"}
    prompts.write_text(json.dumps(line) + "\n")
    small = ["--pin-layers", "2", "--max-tokens", "6", "--repeat", "1", "--budgets", "2"]
    command = [sys.executable, str(ROOT / "scripts/bench_peer.py"), *pair.options, *small]
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        [*command, "--prompts", str(prompts), "--json", str(figures)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert set(found) == {"peer", "trees", "start", "memory"}
    assert found["peer"]["equal"] == 1
    assert found["trees"]["equal"] is True
    assert found["start"]["median"] > 0
    assert found["memory"]["ratio"] > 0
