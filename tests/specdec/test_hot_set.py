"""Hot sets: the most used experts are in the slots before the first token, and cost is told."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from specdec.errors import ExpertReadError, RoutingLogError
from specdec.generation import Request, generate
from specdec.hot_set import HotSet
from specdec.load import Settings, load
from specdec.routing_log import RoutingLog
from tests.commands import PROMPT, fails, recorded, run
from tests.logs import header, log_of, write_log
from tests.pairs import write_pair

FEW = ["--pin-layers", "1", "--cache-slots", "9"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


def loaded(pair, slots=9, pins=1):
    return load(
        Settings(str(pair.target), context=64, cache_slots=slots, pin_layers=pins, budget=1)
    )


def by_hand(random=None):
    random = random or np.random.default_rng(3)
    return HotSet("x", {layer: random.integers(0, 50, 8) for layer in range(4)})


@pytest.mark.parametrize("slots", [1, 5, 9, 24])
def test_the_slots_hold_the_most_used(pair, slots):
    cache, hot = loaded(pair, slots).engine.target.experts, by_hand()
    done = hot.warm(cache)
    ranked = sorted((-hot.uses[n][e], n, e) for n in (1, 2, 3) for e in range(8) if hot.uses[n][e])
    wanted = {(n, e) for _, n, e in ranked[:slots]}
    assert {(n, int(e)) for n in (1, 2, 3) for e in cache.resident(n)} == wanted
    each = sum(t.bytes_on_disk for t in cache.store.geometry(1).tensors)
    assert (done.experts, done.bytes_read) == (len(wanted), len(wanted) * each)
    assert done.named == len(ranked)
    assert all(one.hits == one.misses == one.bytes_read == 0 for one in cache.counters())
    # The most used are the most recent: a new expert takes the place of the least used.
    if slots < len(ranked):
        new = next(e for n, e in ((1, e) for e in range(8)) if (n, e) not in wanted)
        list(cache.waves(1, np.array([new])))
        _, layer, expert = ranked[slots - 1]
        assert expert not in cache.resident(layer)


def test_warming_changes_no_token_and_saves_misses(pair):
    request = Request((1, 2, 3, 4), 1, max_tokens=16)
    cold = loaded(pair)
    first = generate(cold.engine, cold.tokenizer, request)
    warm = loaded(pair)
    cache = warm.engine.target.experts
    every = HotSet("x", {n: np.arange(8) + 1 for n in range(4)})
    done = every.warm(cache)
    second = generate(warm.engine, warm.tokenizer, request)
    assert first.tokens == second.tokens
    assert done.experts == 9
    misses = [sum(one.misses for one in result.experts) for result in (first, second)]
    assert misses[1] < misses[0]


def test_a_read_error_is_said_and_leaves_the_cache_usable(tmp_path):
    pair = write_pair(tmp_path)
    one = loaded(pair)
    cache = one.engine.target.experts
    file = next(pair.target.glob("*.safetensors"))
    whole, times = file.read_bytes(), file.stat()
    os.truncate(file, len(whole) // 2)
    with pytest.raises(ExpertReadError, match=file.name):
        HotSet("x", {n: np.arange(8) + 1 for n in range(4)}).warm(cache)
    file.write_bytes(whole)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # or it would count as changed
    generate(one.engine, one.tokenizer, Request((1, 2), 1, max_tokens=3))


def test_saved_and_read_again(tmp_path):
    hot = by_hand()
    hot.save(tmp_path / "hot")
    again = HotSet.read(tmp_path / "hot")
    assert again.model == "x"
    assert all(np.array_equal(hot.uses[layer], again.uses[layer]) for layer in hot.uses)


def test_a_routing_log_is_a_hot_set(tmp_path):
    log = log_of(header(4, 8, 2), np.random.default_rng(0), passes=9, rows=3)
    write_log(tmp_path / "log", log)
    hot = HotSet.read(tmp_path / "log")
    assert np.array_equal(np.stack([hot.uses[n] for n in range(4)]), log.uses())


def test_the_command_line(pair, tmp_path):
    hot, log = tmp_path / "hot", tmp_path / "log"
    arguments = ["generate", *pair.options, *PROMPT, "--max-tokens", "9", "--ignore-eos", *FEW]
    _, cold = recorded(tmp_path, *arguments, "--save-warm", hot, "--collect-routing", log)
    saved = HotSet.read(hot)
    assert np.array_equal(
        np.stack([saved.uses[layer] for layer in range(4)]), RoutingLog.read(log).uses()
    )
    assert cold["warm"] is None
    for path in (hot, log):
        done, warm = recorded(tmp_path, *arguments, "--warm", path)
        assert warm["warm"]["experts"] == 9
        assert "warmed 9 of" in done.stderr
        runs = [one["runs"]["speculative"] for one in (cold, warm)]
        assert runs[0]["tokens"] == runs[1]["tokens"]
        assert warm["warm"]["bytes_read"] > 0
        experts = [one["metrics"]["experts"] for one in runs]
        assert experts[1]["hits"] > experts[0]["hits"]
        assert (
            experts[0]["hits"] + experts[0]["misses"] == experts[1]["hits"] + experts[1]["misses"]
        )


def test_a_bench_takes_them_too(pair, tmp_path):
    prompts, hot = tmp_path / "prompts.jsonl", tmp_path / "hot"
    prompts.write_text(json.dumps({"id": "a", "class": "a", "prompt": "the sea"}))
    arguments = ["bench", *pair.options, "--prompts", prompts, "--budgets", "1", "--repeat", "1"]
    arguments += ["--max-tokens", "4", *FEW]
    assert run(*arguments, "--save-warm", hot).exit_code == 0
    _, document = recorded(tmp_path, *arguments, "--warm", hot)
    assert document["warm"]["experts"] == 9


BROKEN = {
    "neither a routing log nor a hot set": "PK",
    "not valid JSON": "{",
    "format 'x'": '{"format": "x"}',
    "broken": '{"format": "specdec-hot-set", "schema": 1, "uses": {"0": ["a"]}}',
    "negative": '{"format": "specdec-hot-set", "schema": 1, "uses": {"0": [-1]}}',
}


@pytest.mark.parametrize("words", BROKEN)
def test_other_files_are_refused_before_loading(pair, tmp_path, words):
    path = tmp_path / "hot"
    path.write_text(BROKEN[words])
    done = run("generate", *pair.options, *PROMPT, "--warm", path)
    assert fails(done, words, str(path))
    assert "memory plan" not in done.stderr


def test_a_hot_set_of_another_model_is_refused(pair, tmp_path):
    path = tmp_path / "hot"
    HotSet("other", {0: np.ones(4, np.int64)}).save(path)
    done = run("generate", *pair.options, *PROMPT, "--warm", path)
    assert fails(done, str(path), "1 layers of 4 experts", "4 of 8")


def test_a_place_that_cannot_be_written_is_found_before_loading(pair, tmp_path):
    path = tmp_path / "absent" / "hot"
    done = run("generate", *pair.options, *PROMPT, "--save-warm", path)
    assert fails(done, str(path))
    assert "memory plan" not in done.stderr
    with pytest.raises(RoutingLogError, match="cannot be read"):
        HotSet.read(Path("/absent/hot"))
