"""The streaming benchmark: its traces are what they say, and all of its parts run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts.streaming.checkpoint import MARKER, prepare
from scripts.streaming.script import AGREEMENT, Script
from scripts.streaming.trace import TARGETS, UNION, Shape, Trace, local_trace, random_trace
from specdec.tree.block import Block
from specdec.tree.draft_tree import DraftTree

ROOT = Path(__file__).parents[2]
SHAPE = Shape(2, 64, 4, 500)


@pytest.fixture(scope="module")
def local() -> Trace:
    return local_trace(SHAPE, 600)


def bench(*options):
    return subprocess.run(
        [sys.executable, "-m", "scripts.bench_streaming", "--tiny", *options],
        cwd=ROOT,
        env={**os.environ, "SPECDEC_KERNELS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def lru_hit_rate(trace: Trace, slots: int, first: int) -> float:
    """The slow and obvious way."""
    hits = []
    for layer in range(trace.shape.layers):
        held: list[int] = []
        for at, row in enumerate(trace.experts[:, layer].tolist()):
            if at >= first:
                hits += [expert in held for expert in row]
            for expert in reversed(row):
                held = [expert, *(one for one in held if one != expert)]
            held = held[:slots]
    return float(np.mean(hits))


def test_the_local_trace_has_the_hit_rates_asked_for(local):
    for slots, wanted in zip((32, 16, 8), TARGETS, strict=True):
        assert abs(lru_hit_rate(local, slots, 100) - wanted) < 0.04
        assert local.hit_rate(slots, 100) == pytest.approx(lru_hit_rate(local, slots, 100))
    assert abs(local.distinct(8) / 32 - UNION) < 0.06
    random = random_trace(SHAPE, 600)
    assert abs(lru_hit_rate(random, 32, 100) - 0.5) < 0.04
    for trace in (local, random):
        assert all(len(set(row)) == 4 for row in trace.experts.reshape(-1, 4).tolist())


def test_recent_is_what_a_cache_by_recency_holds(local):
    found = local.recent(1, 300, 10)
    used = local.experts[:300, 1][::-1].ravel()
    assert len(set(found.tolist())) == 10
    last = [int(np.argmax(used == expert)) for expert in found]
    assert last == sorted(last)
    others = np.setdiff1d(used, found)
    assert all(np.argmax(used == expert) > last[-1] for expert in others)


def test_rows_beside_the_text_share_some_of_its_experts(local):
    shared = []
    for position in range(100, 300):
        text = local.row(position, int(local.tokens[position]), True)
        assert (text == local.experts[position]).all()
        beside = local.row(position, 499, False)
        assert (beside == local.row(position, 499, False)).all()
        assert all(len(set(row)) == 4 for row in beside.tolist())
        shared.append(np.mean([np.isin(*pair).mean() for pair in zip(text, beside, strict=True)]))
    assert 0.5 < np.mean(shared) < 0.75


def test_proposals_agree_with_the_text_as_often_as_they_say(local):
    script = Script((0, 1))
    script.trace = local
    asked = Block(np.arange(24, dtype=np.int32).reshape(3, 8), np.full((3, 8), -3.0))
    right, sure = [], []
    for length in range(500):
        block = script.agree(asked, length)
        text = local.tokens[length + 1 : length + 4]
        right.append(block.tokens[:, 0] == text)
        sure.append(np.exp(block.log_probs[:, 0]))
    assert np.abs(np.mean(right, axis=0) - AGREEMENT[:3]).max() < 0.06
    assert np.abs(np.mean(right, axis=0) - np.mean(sure, axis=0)).max() < 0.06


def test_a_wrong_token_leads_nowhere(local):
    script = Script((0, 1))
    script.trace = local
    wrong = (int(local.tokens[51]) + 1) % 500
    tokens = np.array([local.tokens[50], wrong, local.tokens[51], local.tokens[52]], np.int32)
    script.enter(DraftTree(tokens, np.array([-1, 0, 0, 1], np.int32), np.zeros(4)), 50)
    assert script.chosen == [local.tokens[51], None, local.tokens[52], None]


def test_a_checkpoint_is_written_once(tmp_path):
    folders = prepare(tmp_path, 4, True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert prepare(tmp_path, 4, True) == folders
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    (tmp_path / MARKER).unlink()  # as if it had been interrupted
    prepare(tmp_path, 4, True)
    assert folders.repacked.stat().st_mtime_ns > before[folders.repacked]


def test_every_part_runs(tmp_path):
    pytest.importorskip("mlx_lm")
    out = tmp_path / "figures.json"
    small = [
        "--tokens",
        "6",
        "--speculation-tokens",
        "6",
        "--peer-tokens",
        "2",
        "--repeats",
        "1",
        "--budgets",
        "2,4",
    ]
    small += ["--depths", "1,4", "--experts", "16", "--shares", "1,0.5,0.125", "--peer-gb", "1"]
    small += ["--prefetch", "off,layer", "--folder", str(tmp_path / "model"), "--json", str(out)]
    done = bench(*small)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())
    assert set(figures["reads"]["depths"]) == {"1", "4"}
    settings = figures["residency"]["settings"]
    assert len(settings) == 2 + 2 * 3
    for routing in ("local", "random"):
        plain = [s for s in settings if (s["routing"], s["prefetch"]) == (routing, "off")]
        assert [one["share"] for one in plain] == [1, 0.5, 0.125]
        read, hits = ([one[key] for one in plain] for key in ("bytes", "hit_rate"))
        assert read[0] == 0 < read[1] < read[2]
        assert hits[1] > hits[2]
    for one in settings:
        assert one["acceptance"] == 1
        assert (one["share"] == 1) == (one["rate_share"] == 1)
        assert 0 < one["possible"] <= 1
    rounds: dict[int | str, list[float]] = {}
    for one in figures["speculation"]["settings"]:
        rounds.setdefault(one["budget"], []).append(one["acceptance"])
    assert set(rounds) == {1, 2, 4, "auto"}
    for budget in (1, 2, 4):  # what is accepted does not depend on what is in memory
        assert len(set(rounds[budget])) == 1
    assert rounds[1][0] == 1 < rounds[2][0]
    engines = figures["peer"]["engines"]
    assert set(engines) == {"specdec", "mlx-lm, mapped", "mlx-lm, shipped", "mlx-lm, resident"}
    assert all(engine["rate"] > 0 for engine in engines.values())


@pytest.mark.parametrize(
    ("options", "word"), [(["--shares", "0.5"], "--shares"), (["--parts", "disk"], "disk")]
)
def test_what_cannot_be_run_is_refused(options, word):
    done = bench(*options)
    assert done.returncode == 2
    assert word in done.stderr
