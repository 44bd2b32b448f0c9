"""Prefetch at the command line: no token changes, the settings arrive, and what it did is told."""

import errno
import json
import os

import pytest

from specdec import checkpoint
from specdec.errors import ExpertReadError
from specdec.target import read_queue, trial
from specdec.target.streaming import PREFETCH
from tests.commands import PROMPT, recorded, run
from tests.pairs import write_pair

FEW = ["--pin-layers", "1", "--cache-slots", "14", "--protect", "0,0"]
WAYS = ("off", "draft", "layer", "auto")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def eager(monkeypatch):
    """A trial of turns of one pass, whether or not anybody waits."""
    monkeypatch.setattr(trial, "WAITING", 0.0)
    monkeypatch.setattr(trial, "WINDOW", 1)
    monkeypatch.setattr(trial, "SETTLING", 0)
    monkeypatch.setattr(trial, "PASSES", 4)
    monkeypatch.setattr(trial, "MOST_PASSES", 4)


def generated(pair, tmp_path, *arguments, budget=4, tokens=24):
    """The document of a run, and the run."""
    done, document = recorded(
        tmp_path,
        *("generate", *pair.options, *PROMPT, "--ignore-eos", "--max-tokens", tokens),
        *("--budget", budget, *arguments),
    )
    (only,) = document["runs"].values()
    return done, document, only


def test_the_command_names_what_the_engine_knows():
    from specdec.commands import options

    assert options.PREFETCH == PREFETCH
    assert sorted(PREFETCH) == sorted(WAYS)


@pytest.mark.parametrize("budget", [1, 4])
@pytest.mark.parametrize("io", ["buffered", "direct"])
def test_no_token_depends_on_it(pair, tmp_path, eager, budget, io):
    tokens = {
        tuple(
            generated(
                pair,
                tmp_path,
                *("--pin-layers", "1", "--cache-slots", slots, "--prefetch", way, "--io", io),
                budget=budget,
                tokens=16,
            )[2]["tokens"]
        )
        for way in WAYS
        for slots in (3, 14)
    }
    assert len(tokens) == 1


def test_no_token_depends_on_it_under_a_memory_cap(pair, tmp_path, eager):
    """What prefetching takes is part of the plan."""
    tokens = set()
    for way in WAYS:
        _, document, one = generated(pair, tmp_path, *FEW, "--memory-gb", "4", "--prefetch", way)
        assert document["plan"]["total"] <= document["plan"]["cap"] == 4_000_000_000
        names = {part["name"] for part in document["plan"]["parts"]}
        assert ("routing table" in names) == (way in ("draft", "auto"))
        tokens.add(tuple(one["tokens"]))
    assert len(tokens) == 1


@pytest.mark.parametrize("way", WAYS)
def test_the_way_reaches_the_engine_and_its_figures_the_report(pair, tmp_path, eager, way):
    done, document, one = generated(pair, tmp_path, *FEW, "--prefetch", way)
    assert document["settings"]["prefetch"] == way
    assert f"protected; prefetch {way}" in str(document["plan"]["parts"])
    found = one["metrics"]["experts"]["prefetch"]
    assert found["way"] == way
    passes = one["metrics"]["rounds"]
    if way == "off":
        assert found["passes"] == {}
        assert found["experts"] == found["bytes"] == 0
        assert "prefetch  " not in done.stderr
        return
    assert sum(found["passes"].values()) == passes
    assert set(found["passes"]) <= ({"off", "draft", "layer"} if way == "auto" else {way})
    assert f"prefetch    {way}: " in done.stderr
    assert bool(found["verdicts"]) == (way == "auto")
    assert all(f"prefetch {words}" in done.stderr for words in found["verdicts"])
    experts = one["metrics"]["experts"]
    assert found["bytes"] <= experts["bytes_read"]
    assert found["wasted_bytes"] <= found["bytes"]
    assert found["in_time"] <= min(found["experts"], experts["hits"])
    assert found["late"] <= experts["misses"]
    if way != "auto":
        assert found["experts"] > 0
        assert found["coverage"] == found["in_time"] / (found["in_time"] + experts["misses"])
        assert "of misses covered" in done.stderr


def test_auto_is_what_happens_without_a_word(pair, tmp_path):
    _, document, _ = generated(pair, tmp_path, *FEW, tokens=2)
    assert document["settings"]["prefetch"] == "auto"


def test_a_cap_in_megabytes_reaches_the_engine(pair, tmp_path):
    def read_ahead(*arguments):
        _, document, one = generated(pair, tmp_path, *FEW, "--prefetch", "layer", *arguments)
        return document, one["metrics"]["experts"]["prefetch"]["experts"]

    document, none = read_ahead("--prefetch-mb", "0.000001")
    assert document["settings"]["prefetch_mb"] == 0.000001
    assert none == 0
    assert read_ahead("--prefetch-mb", "100")[1] > 0


def test_settings_that_cannot_be_meant(pair):
    start = ["generate", *pair.options, *PROMPT]
    done = run(*start, "--prefetch", "off", "--prefetch-mb", "1")
    assert done.exit_code == 2
    assert "--prefetch-mb is of no use with --prefetch off" in done.stderr
    for wrong in (["--prefetch", "on"], ["--prefetch-mb", "0"], ["--prefetch-mb", "inf"]):
        assert run(*start, *wrong).exit_code == 2


def test_with_a_tolerance_auto_is_off(pair, tmp_path):
    """What is in memory would depend on the clock, and with a tolerance so would the text."""
    _, _, one = generated(pair, tmp_path, *FEW, "--cache-tolerance", "0.1")
    assert one["metrics"]["experts"]["prefetch"]["way"] == "off"


def test_a_routing_log_begins_the_table(pair, tmp_path):
    log = tmp_path / "log"
    generated(pair, tmp_path, *FEW, "--prefetch", "draft", "--collect-routing", log)
    done, document, _ = generated(pair, tmp_path, *FEW, "--prefetch", "draft", "--warm", log)
    assert document["warm"]["tokens"] > 0
    assert f"routing table of {document['warm']['tokens']} tokens" in done.stderr
    _, document, _ = generated(pair, tmp_path, *FEW, "--prefetch", "layer", "--warm", log)
    assert document["warm"]["tokens"] == 0


def test_a_bench_tells_it_beside_its_tables(pair, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": "a", "class": "a", "prompt": "the sea, the sea"}))
    line = ["bench", *pair.options, "--prompts", prompts, "--budgets", "1,3", "--repeat", "1"]
    done = run(*line, *FEW, "--max-tokens", "12", "--ignore-eos", "--prefetch", "layer")
    assert done.exit_code == 0, done.stderr
    (told,) = [one for one in done.stdout.splitlines() if one.startswith("prefetch: ")]
    assert told.count("read ahead") == 2


@pytest.mark.parametrize("way", ["draft", "layer"])
def test_reads_ahead_that_fail_end_nothing(pair, tmp_path, monkeypatch, way):
    """Every third read ahead meets an error; tokens are the same, and the failures are told."""
    _, _, good = generated(pair, tmp_path, *FEW, "--prefetch", "off")
    count: list[int] = [0]
    ahead: set[object] = set()
    kept: list[object] = []
    original = read_queue.ReadQueue.submit

    def marked(self, several, idle):
        requests = original(self, several, idle)
        if idle:
            ahead.update(map(id, requests))
            kept.extend(requests)  # an id is another's once its owner is gone
        return requests

    finish = read_queue.Request.finish

    def finishing(self, done, error):
        if id(self) in ahead and done:
            count[0] += 1
            if count[0] % 3 == 0:
                error = ExpertReadError("an error of the disk")
        finish(self, done, error)

    monkeypatch.setattr(read_queue.ReadQueue, "submit", marked)
    monkeypatch.setattr(read_queue.Request, "finish", finishing)
    done, _, one = generated(pair, tmp_path, *FEW, "--prefetch", way)
    assert one["tokens"] == good["tokens"]
    failed = one["metrics"]["experts"]["prefetch"]["failed"]
    assert failed > 0
    assert f"{failed} reads FAILED" in done.stderr


def test_a_disk_that_is_broken_is_said(pair, monkeypatch):
    real, calls = checkpoint.read_at, [0]

    def read(*arguments):
        calls[0] += 1
        if calls[0] > 300:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "read_at", read)
    done = run(
        *("generate", *pair.options, *PROMPT, *FEW, "--prefetch", "layer"),
        *("--ignore-eos", "--max-tokens", "200"),
    )
    assert done.exit_code == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Input/output error" in line
