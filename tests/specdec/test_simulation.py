"""Simulation: the same hits and misses as the cache itself, and a bound that nothing beats."""

import json
import time
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import replay
from specdec.checkpoint import Checkpoint
from specdec.errors import PlanError
from specdec.generation import Request, generate
from specdec.instant import Instant
from specdec.load import Settings, load
from specdec.predictors import PREDICTORS, foresee
from specdec.routing_log import RoutingLog
from specdec.routing_writer import RoutingWriter
from specdec.simulation import (
    Setting,
    best,
    fitting,
    groups,
    replay_table,
    resident_bytes,
    simulate,
)
from specdec.target.admission import Admission
from specdec.target.config import TargetConfig
from specdec.target.expert_cache import ExpertCache
from specdec.target.expert_store import ExpertStore
from specdec.target.pins import pinned_layers
from specdec.target.policy import POLICIES, make_policy
from specdec.target.slots import SlotTable
from specdec.target.streaming import Streaming
from specdec.trace import Trace, ask_starts, pass_starts
from tests.checkpoints import write_checkpoint
from tests.commands import PROMPT, fails, recorded, run
from tests.logs import header, log_of, write_log
from tests.pairs import write_pair
from tests.target.test_expert_faults import settle

MIXED = {"layers.1.mlp.switch_mlp.down_proj": (8, 32)}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    small: dict[str, Any] = {"hidden_size": 32, "moe_intermediate_size": 32, "gates": (8, 32)}
    folder = write_checkpoint(tmp_path_factory.mktemp("m"), "qwen3_moe", mixed=MIXED, **small)
    checkpoint = Checkpoint.open(folder)
    return ExpertStore(checkpoint, TargetConfig.of(checkpoint))


def real(store, log, setting):
    """(hits, misses, pinned requests) of the cache itself, fed with the log."""
    how = Streaming(policy=setting.policy, protect=setting.protect, rows=setting.rows)
    pinned = pinned_layers(setting.pins, store.layers)
    cache = ExpertCache(store, pinned, setting.slots, mx.float32, how)
    for at in range(log.passes):
        rows = log.rows[log.starts[at] : log.starts[at + 1]]
        for column, layer in enumerate(log.header.layers):
            for _ in cache.waves(layer, rows["experts"][:, column].ravel()):
                pass
        committed = rows[(rows["flags"] & 1) > 0]
        for column, layer in enumerate(log.header.layers):
            cache.touch(layer, committed["experts"][:, column])
    found = cache.counters()
    return (
        sum(one.hits for one in found if not one.pinned),
        sum(one.misses for one in found),
        sum(one.hits for one in found if one.pinned),
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(2, 32),
    pins=st.integers(0, 4),
    rows=st.integers(1, 6),
    policy=st.sampled_from(POLICIES),
    protect=st.sampled_from([(0, 0), (1, 1), (6, 3)]),
)
def test_hits_and_misses_are_those_of_the_cache(store, seed, slots, pins, rows, policy, protect):
    random = np.random.default_rng(seed)
    head = header(4, 8, 2, kinds=(0, 1, 0, 0))
    log = log_of(head, random, passes=12, rows=rows, prompt=int(random.integers(0, 7)))
    setting = Setting(pins, slots, policy, protect, rows)
    done = simulate(Trace.of(log), setting)
    assert (done.hits, done.misses, done.pinned_requests) == real(store, log, setting)
    assert done.optimal >= done.hits


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(1, 40),
    layers=st.integers(1, 4),
    quota=st.integers(0, 9),
)
def test_the_compiled_replay_is_the_bookkeeping(seed, slots, layers, quota):
    random = np.random.default_rng(seed)
    log = log_of(header(layers, 12, 3), random, passes=20, rows=4)
    trace = Trace.of(log)
    asks, uses = trace.part(list(range(layers)))
    shares = np.minimum(random.integers(0, quota + 1, layers), slots // layers)
    arguments = (asks, ask_starts(asks), uses, pass_starts(uses, trace.passes), 12, slots, shares)
    compiled, table = replay.lru(*arguments), replay_table(*arguments, "lru")
    assert [one.tolist() for one in compiled] == [one.tolist() for one in table]


def belady(asks, starts, slots):
    """Fewest misses, the slow way: after each asking, what is needed again soonest stays."""
    held: set[tuple[int, ...]] = set()
    misses = 0
    keys = [tuple(one[1:]) for one in asks.tolist()]
    for first, last in pairwise(starts):
        asked, later = set(keys[first:last]), keys[last:]
        misses += len(asked - held)
        ranked = sorted(held | asked, key=lambda one: later.index(one) if one in later else 10**9)
        held = set(ranked[:slots])
    return misses


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), slots=st.integers(1, 12))
def test_the_bound_is_beladys(seed, slots):
    log = log_of(header(2, 6, 2), np.random.default_rng(seed), passes=12, rows=2)
    asks, _ = Trace.of(log).part([0, 1])
    hits, misses = replay.optimal(asks, ask_starts(asks), 6, slots, 2)
    assert misses.sum() == belady(asks, ask_starts(asks).tolist(), slots)
    assert hits.sum() + misses.sum() == len(asks)


@pytest.mark.parametrize("budget", [1, 4])
@pytest.mark.parametrize(("pins", "slots"), [(0, 12), (1, 9), (2, 5), (4, 1)])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_simulated_setting_has_the_counters_of_a_real_run(tmp_path, budget, pins, slots, policy):
    pair = write_pair(tmp_path, mixed=MIXED)

    def go(path, pins, slots, policy):
        with RoutingWriter(path and str(path)) as writer:
            loaded = load(
                Settings(
                    str(pair.target),
                    str(pair.draft),
                    context=64,
                    budget=budget,
                    pin_layers=pins,
                    cache_slots=slots,
                    streaming=Streaming(policy=policy, prefetch="off"),
                )
            )
            writer.begin(loaded)
            return generate(
                loaded.engine, loaded.tokenizer, Request((1, 2, 3), budget, max_tokens=25)
            )

    go(tmp_path / "log", 3, 4, "lru")  # logged under another setting than the one simulated
    head = RoutingLog.read(tmp_path / "log").header
    found = go(None, pins, slots, policy).experts
    setting = Setting(pins, slots, policy, (head.protect[0], head.protect[1]), head.rows)
    done = simulate(Trace.of(RoutingLog.read(tmp_path / "log")), setting)
    assert done.hits == sum(one.hits for one in found if not one.pinned)
    assert done.misses == sum(one.misses for one in found)
    assert done.pinned_requests == sum(one.hits for one in found if one.pinned)
    assert done.bytes_read == sum(one.bytes_read for one in found)


def test_the_best_setting_is_the_best_of_those_that_fit():
    log = log_of(header(4, 8, 2, kinds=(0, 1, 0, 0)), np.random.default_rng(2), passes=30, rows=3)
    trace, like = Trace.of(log), Setting(0, 1, "lru")
    room = resident_bytes(trace, 1, 12)
    found = best(trace, room, POLICIES, like)
    tried = [one for policy in POLICIES for one in fitting(trace, room, policy, like)]
    assert {one.pins for one in tried} == {0, 1, 2}
    assert all(resident_bytes(trace, one.pins, one.slots) <= room for one in tried)
    lru = [simulate(trace, one).bytes_read for one in tried if one.policy == "lru"]
    assert found.bytes_read <= min(lru)
    with pytest.raises(PlanError, match="are left for experts"):
        best(trace, 10, POLICIES, like)


def test_a_million_requests_take_seconds():
    random = np.random.default_rng(0)
    log = log_of(header(40, 256, 8), random, passes=3200, rows=1)
    trace = Trace.of(log)
    assert len(trace.asks) > 1_000_000
    simulate(trace, Setting(1, 100, "lru"))  # compiles
    start = time.perf_counter()
    simulate(trace, Setting(4, 2000, "lru"))
    assert time.perf_counter() - start < 20


# --- the command


def test_the_command(tmp_path):
    pair, log = write_pair(tmp_path), tmp_path / "log"
    few = ["--pin-layers", "1", "--cache-slots", "7", "--prefetch", "off"]
    arguments = ["generate", *pair.options, *PROMPT, "--max-tokens", "12", *few]
    _, document = recorded(tmp_path, *arguments, "--collect-routing", log)
    experts = document["runs"]["speculative"]["metrics"]["experts"]
    done = run("simulate", log)
    assert done.exit_code == 0, done.stderr
    line = next(one for one in done.stdout.splitlines() if one.split()[:3] == ["1", "7", "lru"])
    assert f"{100 * experts['hit_rate']:.1f} %" in line
    done = run(
        *("simulate", log, "--slots", "5,9", "--pins", "0,2", "--policy", "lru,s3-fifo"),
        *("--memory-gb", "50"),
    )
    assert done.exit_code == 0, done.stderr
    rows = [one.split()[:3] for one in done.stdout.splitlines()]
    for pins, slots, policy in product("02", "59", ("lru", "s3-fifo")):
        assert [pins, slots, policy] in rows
    assert "best within 50.0 GB" in done.stdout
    assert done.stdout.splitlines()[-1] == "--pin-layers 4 --cache-slots 1 --policy lru"


def test_the_json_has_what_is_printed_and_is_documented(tmp_path):
    log, path = tmp_path / "log", tmp_path / "sim.json"
    random = np.random.default_rng(4)
    write_log(log, log_of(header(4, 8, 2), random, passes=12, rows=2, prompt=3))
    line = ["simulate", log, "--slots", "6,12", "--memory-gb", "0.001", "--json", path]
    done = run(*line, "--prefetch", "previous,draft,layer")
    assert done.exit_code == 0, done.stderr
    document = json.loads(path.read_text())
    assert document["kind"] == "simulate"
    assert [one["slots"] for one in document["outcomes"]] == [6, 12]
    assert document["best"]["bytes_read"] == 0  # all of it fits
    rows = [one.split() for one in done.stdout.splitlines()]
    for one in document["prefetch"]:
        (row,) = [row for row in rows if row[1:4] == [str(one["slots"]), "lru", one["predictor"]]]
        assert row[4] == f"{100 * one['hit_rate']:.1f}"
    assert len(document["prefetch"]) == 2 * 4
    documented = (Path(__file__).parents[2] / "docs/json.md").read_text()
    fields = {*document, *document["log"], *document["outcomes"][0], *document["prefetch"][0]}
    assert {name for name in fields if f"`{name}`" not in documented} == set()


def test_with_all_layers_pinned_there_is_nothing_to_foresee(tmp_path):
    log, path = tmp_path / "log", tmp_path / "sim.json"
    head = header(3, 8, 2, pinned=(0, 1, 2))
    write_log(log, log_of(head, np.random.default_rng(6), passes=8, rows=2, prompt=3))
    done = run("simulate", log, "--prefetch", "previous,draft,layer", "--json", path)
    assert done.exit_code == 0, done.stderr
    for one in json.loads(path.read_text())["prefetch"]:
        assert (one["begun"], one["misses"], one["bytes_read"]) == (0, 0, 0)
        assert one["hit_rate"] is one["coverage"] is None


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(2, 32),
    policy=st.sampled_from(POLICIES),
    chance=st.sampled_from([0.2, 0.5, 0.9]),
)
def test_reads_ahead_are_those_of_the_cache(store, seed, slots, policy, chance):
    """The same guesses, asked of the cache and of what replays logs: the same experts begun, the
    same hits, the same in memory after every step, and the same left unused."""
    random, protect = np.random.default_rng(seed), (0, 0)
    cache = ExpertCache(store, (), slots, mx.float32, Streaming(policy=policy, protect=protect))
    head = header(4, 8, 2, kinds=(0, 1, 0, 0))
    log = log_of(head, random, passes=1, rows=1)
    admissions: dict[int, Admission] = {}
    for group in groups(Trace.of(log), Setting(0, slots, policy, protect)):
        table = SlotTable(group.slots, 8, group.quotas, make_policy(policy, group.slots))
        admissions |= dict.fromkeys(group.layers, Admission(table, Instant(table)))
    hits = misses = early = 0
    for _ in range(30):
        layer, ids = int(random.integers(0, 4)), random.permutation(8)[: random.integers(1, 5)]
        guess = random.permutation(8)[: random.integers(0, 4)]
        after = (layer + 1) % 4
        begun = cache.prefetch(after, guess, chance, 3)
        settle(cache)
        assert admissions[after].ahead(after, guess, chance, 3).tolist() == begun.tolist()
        for _ in cache.waves(layer, ids):
            pass
        asked = admissions[layer].ask(layer, np.sort(ids).astype(np.int32))
        for _ in admissions[layer].waves(asked):
            pass
        hits, misses = hits + len(asked.hits), misses + len(asked.missing)
        early += asked.early
        used = random.permutation(ids)[: random.integers(0, len(ids) + 1)]
        cache.touch(layer, used)
        admissions[layer].table.touch(layer, used)
        for one in range(4):
            held = admissions[one].table.resident(one)
            assert held.tolist() == cache.resident(one).tolist()
    found = cache.counters()
    unused = {id(one.table): one.table.unused for one in admissions.values()}
    each = [store.geometry(layer).bytes_on_disk for layer in range(4)]
    assert sum(one.hits for one in found) == hits
    assert sum(one.misses for one in found) == misses
    assert sum(one.early_hits for one in found) == early
    assert sum(one.wasted_bytes for one in found) == sum(
        count * each[layer] for table in unused.values() for layer, count in table.items()
    )


# --- predictors


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(2, 32),
    pins=st.integers(0, 3),
    policy=st.sampled_from(POLICIES),
)
def test_without_a_predictor_it_is_the_simulation(seed, slots, pins, policy):
    random = np.random.default_rng(seed)
    head = header(4, 8, 2, kinds=(0, 1, 0, 0))
    log = log_of(head, random, passes=12, rows=4, prompt=int(random.integers(0, 7)))
    setting = Setting(pins, slots, policy)
    plain, done = simulate(Trace.of(log), setting), foresee(log, setting, "off")
    assert (done.hits, done.misses, done.bytes_read) == (
        *(plain.hits, plain.misses),
        plain.bytes_read,
    )
    assert done.begun == done.guesses == done.wasted == 0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    slots=st.integers(2, 32),
    predictor=st.sampled_from(PREDICTORS[1:]),
)
def test_predictors_count_what_they_read(seed, slots, predictor):
    random = np.random.default_rng(seed)
    log = log_of(header(4, 8, 2, kinds=(0, 1, 0, 0)), random, passes=20, rows=3)
    plain, done = (foresee(log, Setting(1, slots, "lru"), one) for one in ("off", predictor))
    assert done.hits + done.misses == plain.hits + plain.misses
    assert done.in_time + done.wasted <= done.begun
    assert done.in_time <= done.hits
    assert done.right <= min(done.guesses, done.asked)
    each = log.header.disk_bytes[1:]
    reads = done.misses + done.begun
    assert min(each) * reads <= done.bytes_read <= max(each) * reads


def test_each_predictor_finds_what_it_looks_for():
    """Routing that follows the token, the last token, or the layer before, and is found by those
    who look there."""
    random = np.random.default_rng(5)
    head = header(3, 64, 2)

    def right(choose, predictor):
        log = log_of(head, random, passes=400, rows=1)
        rows = log.rows.copy()
        rows["token"] = random.integers(0, 24, len(rows))
        rows["experts"] = choose(rows["token"], len(rows))
        done = foresee(RoutingLog(head, rows), Setting(0, 24, "lru"), predictor)
        return done.recall, done.coverage

    by_token = random.permuted(np.tile(np.arange(64), (24, 3, 1)), axis=2)[:, :, :2]
    pairs = random.permutation(64).reshape(32, 2)

    def of_token(tokens, count):
        return by_token[tokens]

    def slowly(tokens, count):
        return np.repeat(pairs[random.integers(0, 32, -(-count // 20))], 20, axis=0)[:count, None]

    def down_the_layers(tokens, count):
        start = random.integers(0, 32, count)
        return np.stack([pairs[(start + layer) % 32] for layer in range(3)], axis=1)

    assert right(of_token, "draft")[0] > 0.9
    assert right(of_token, "draft")[1] > 0.5
    assert right(of_token, "previous")[0] < 0.3
    assert right(slowly, "previous")[0] > 0.9
    recall, coverage = right(down_the_layers, "layer")
    assert recall > 0.5  # all but the first layer
    assert coverage > 0.3
    assert right(down_the_layers, "draft")[0] < 0.3


def test_the_command_refuses_in_words(tmp_path):
    log = tmp_path / "log"
    write_log(log, log_of(header(4, 8, 2), np.random.default_rng(0), passes=4, rows=2))
    assert fails(run("simulate", tmp_path / "absent"), "cannot be read")
    assert fails(run("simulate", log, "--pins", "9"), "4 layers")
    assert fails(run("simulate", log, "--memory-gb", "0.000001"), "without experts")
    assert run("simulate", log, "--policy", "magic").exit_code == 2
    assert run("simulate", log, "--slots", "0").exit_code == 2
