"""The scripts for GPU machines run anywhere at tiny sizes: what they need stays as it is."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

from scripts.gpu import bench
from scripts.gpu.case import check
from scripts.gpu.geometry import REAL, TINY, config_of, write_model
from scripts.gpu.rounds import kept_case, walk_case
from specdec.kernels.executor import gpu_kernels
from specdec.mlx_environment import DEFAULTS
from specdec.target.config import TargetConfig
from tests.backends import REFERENCE
from tests.metal.build import compiler
from tests.metal.run import through_shim
from tests.targets import logits_of, opened

ROOT = Path(__file__).parents[2]


def script(name, *options):
    return subprocess.run(
        [sys.executable, "-m", f"scripts.gpu.{name}", *options],
        cwd=ROOT,
        env={**os.environ, "SPECDEC_KERNELS": "reference"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_real_geometry_is_one_that_the_engine_knows():
    config = TargetConfig.from_dict(config_of(REAL), "config.json")
    assert (config.hidden_size, config.num_layers, config.num_experts) == (2048, 40, 256)
    assert config.full_layers == tuple(range(3, 40, 4))
    assert config.gdn is not None
    assert config.gdn.conv_channels == 8192


def test_a_random_checkpoint_decodes_as_in_mlx_lm(tmp_path):
    load_model = pytest.importorskip("mlx_lm.utils").load_model
    folder = write_model(tmp_path / "model", TINY)
    tokens = [1, 5, 9, 200, 639]
    with opened(folder, REFERENCE) as target:
        ours = logits_of(target.prefill(tokens, True))
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    theirs = model(mx.array(tokens)[None])[0]
    assert 0.5 < ours.std() < 10
    assert abs(ours - theirs).max() < 2e-3


def test_the_check_finds_the_reference_right(tmp_path):
    out = tmp_path / "findings.json"
    done = script("check", "--plain", "--only", "route", "replay", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads(out.read_text())["findings"]
    assert {f["op"] for f in findings} == {"route", "replay"}
    assert all(f["ok"] for f in findings)


@pytest.mark.skipif(compiler() is None, reason="needs g++ on Linux")
def test_the_check_of_a_round_sees_one_wrong_number(monkeypatch):
    with through_shim(), gpu_kernels():
        assert check(walk_case(7)).ok
        case = kept_case(mx.float32, TINY, 1, [0, 2])
        assert check(case).ok
        monkeypatch.setattr("scripts.gpu.rounds.kept_rows", lambda keys, *rest: keys[0])
        assert "error" in check(case).failure


def test_the_parts_of_the_benchmark_run_with_what_specdec_tells_mlx(monkeypatch):
    told = {}

    def run(command, env):
        told[command[3]] = {name: env[name] for name in DEFAULTS}
        return subprocess.CompletedProcess(command, 1)

    for name in DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr("sys.argv", ["bench", "model", "kernels"])
    with pytest.raises(SystemExit, match="True"):
        bench.main()
    # kernels by themselves are timed in graphs
    assert told == {"model": DEFAULTS, "kernels": {**DEFAULTS, "MLX_USE_CUDA_GRAPHS": "1"}}


def test_the_benchmark_runs(tmp_path):
    pytest.importorskip("mlx_lm")
    out = tmp_path / "figures.json"
    options = ["--rows", "1", "3", "--folder", str(tmp_path), "--out", str(out)]
    done = script("bench", "--small", "model", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())["model"]
    assert figures["decode"]["tokens_per_second"] > 0
    assert figures["mlx_lm"]["tokens_per_second"] > 0
    assert figures["verify"]["3"]["tree"]["mlx_operations"] > 0
