"""Routing logs: everything that ran is in them, and what is no log is refused."""

import dataclasses
import errno
import json

import numpy as np
import pytest

from specdec import durable
from specdec.errors import RoutingLogError
from specdec.generation import Request, generate
from specdec.load import Settings, load
from specdec.routing_log import COMMITTED, MAGIC, PROMPT, RoutingLog
from specdec.routing_writer import RoutingWriter
from tests.commands import PROMPT as TEXT
from tests.commands import fails, recorded, run
from tests.pairs import write_pair
from tests.specdec.test_repack import Disk


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"), mixed={"layers.2.mlp.switch_mlp": (8, 32)})


def settings(pair, **options):
    return Settings(str(pair.target), str(pair.draft), context=64, **options)


def collected(pair, path, budgets=(4,), tokens=12, **options):
    """(log, results, what each pass chose as the model had it)."""
    seen = []
    with RoutingWriter(str(path)) as writer:
        loaded = load(settings(pair, **options))
        writer.begin(loaded)
        loaded.engine.target.observers.append(
            lambda ids, this, rows: seen.append((ids.copy(), this.positions, dict(this.chosen)))
        )
        results = [
            generate(
                loaded.engine, loaded.tokenizer, Request((1, 2, 3, 4, 5), n, max_tokens=tokens)
            )
            for n in budgets
        ]
    return RoutingLog.read(path), results, seen, loaded


@pytest.mark.parametrize("pins", [0, 2, 4])
def test_the_log_holds_every_row_of_every_pass(pair, tmp_path, pins):
    log, results, seen, loaded = collected(
        pair, tmp_path / "log", (1, 5), pin_layers=pins, cache_slots=9, prefill_chunk=3
    )
    assert log.passes == len(seen) == sum(2 + len(one.rounds) for one in results)
    for at, (ids, positions, chosen) in enumerate(seen):
        rows = log.rows[log.starts[at] : log.starts[at + 1]]
        assert rows["token"].tolist() == ids.tolist()
        assert rows["position"].tolist() == positions.tolist()
        for column, layer in enumerate(log.header.layers):
            assert np.array_equal(rows["experts"][:, column], np.asarray(chosen[layer]))
    prompt = (log.rows["flags"] & PROMPT) > 0
    assert log.rows["run"][prompt].tolist() == [0] * 5 + [1] * 5
    rounds = [one for result in results for one in result.rounds]
    assert log.committed.sum() == 10 + sum(len(one.tokens) for one in rounds)
    assert log.tokens == sum(1 + sum(len(r.tokens) for r in one.rounds) for one in results)
    uses = np.zeros((4, 8), int)
    for row in log.rows[log.committed]:
        for layer in range(4):
            uses[layer, row["experts"][layer]] += 1
    assert np.array_equal(uses, log.uses())
    header = log.header
    assert (header.experts, header.top_k, header.layers) == (8, 2, (0, 1, 2, 3))
    assert header.pinned == loaded.plan.pinned
    store = loaded.engine.target.experts.store
    assert header.disk_bytes[2] == sum(t.bytes_on_disk for t in store.geometry(2).tensors)
    assert len(set(header.kinds)) == len({store.geometry(layer) for layer in range(4)})


def test_generate_and_bench_collect(pair, tmp_path):
    arguments = [*pair.options, "--max-tokens", "6", "--ignore-eos"]
    path = tmp_path / "routing"
    _, document = recorded(tmp_path, "generate", *arguments, *TEXT, "--collect-routing", path)
    log = RoutingLog.read(path)
    one = document["runs"]["speculative"]
    assert log.passes == 1 + one["metrics"]["rounds"]
    assert log.rows["run"].max() == 0
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": "a", "class": "a", "prompt": "the sea"}))
    sweep = ["--prompts", prompts, "--budgets", "1,3", "--repeat", "1", "--collect-routing", path]
    assert run("bench", *arguments, *sweep).exit_code == 0
    assert RoutingLog.read(path).rows["run"].max() == 3  # two untimed runs and two that count


def test_a_log_path_that_cannot_be_written_is_found_before_loading(pair, tmp_path):
    path = tmp_path / "absent" / "log"
    done = run("generate", *pair.options, *TEXT, "--collect-routing", path)
    assert fails(done, str(path), "No such file")
    assert "memory plan" not in done.stderr


def test_a_disk_that_fills_up_leaves_no_log(pair, tmp_path, monkeypatch):
    path = tmp_path / "log"
    path.write_bytes(b"older")
    Disk(monkeypatch, durable, "write_some", 2, errno.ENOSPC)
    with pytest.raises(RoutingLogError, match="No space left"):
        collected(pair, path)
    assert path.read_bytes() == b"older"
    assert [one.name for one in tmp_path.iterdir()] == ["log"]


def test_other_files_are_refused(pair, tmp_path):
    log, *_ = collected(pair, tmp_path / "log")
    good = (tmp_path / "log").read_bytes()
    header = json.loads(good.splitlines()[1])
    body = good[len(MAGIC) + len(good.splitlines()[1]) + 1 :]

    def refused(data, words):
        path = tmp_path / "bad"
        path.write_bytes(data)
        with pytest.raises(RoutingLogError, match=words):
            RoutingLog.read(path)

    def changed(**fields):
        return MAGIC + json.dumps({**header, **fields}).encode() + b"\n" + body

    refused(b"PK\x03\x04", "not a routing log")
    refused(good[:-1], "truncated")
    refused(MAGIC + b"{", "broken header")
    refused(MAGIC + b"[]\n", "expected an object")
    refused(changed(top_k="two"), "broken header")
    refused(changed(top_k=9), "contradict")
    refused(changed(kinds=[0]), "contradict")
    refused(changed(experts=2), "names expert")
    refused(good[: -len(body)], "holds no pass")
    rows = log.rows.copy()
    rows["pass"] = rows["pass"][::-1]
    refused(good[: -len(body)] + rows.tobytes(), "not in order")
    with pytest.raises(RoutingLogError, match="cannot be read"):
        RoutingLog.read(tmp_path / "absent")
    wide = dataclasses.replace(log.header, experts=512)
    assert wide.record["experts"].base == np.dtype("<u2")


def test_the_flags_are_what_the_page_says():
    assert (COMMITTED, PROMPT) == (1, 2)
