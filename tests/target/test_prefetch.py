"""Prefetch: guesses by token and by the next layer's router, when they are made, and what for."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.target import trial as trial_module
from specdec.target.prefetch import DRAFT, LAYER, Prefetcher
from specdec.target.streaming import PREFETCH, Streaming
from specdec.target.token_table import ENTRY_BYTES, TABLE_BYTES, TokenTable, table_tokens
from specdec.target.trial import PASSES, SETTLING, TURNS, WINDOW, Trial
from tests.backends import CPU, REFERENCE, each_exact_backend, needs_numba, same_bits
from tests.checkpoints import write_checkpoint
from tests.targets import logits_of, opened, prefill, state_bytes, tree_of

PROMPT = np.random.default_rng(1).integers(0, 320, 40).tolist()


# --- the table


class Latest:
    """A table as a dictionary, the oldest token first."""

    def __init__(self, tokens):
        self.tokens, self.held = tokens, {}

    def learn(self, token, experts):
        self.held.pop(token, None)
        if len(self.held) == self.tokens:
            del self.held[next(iter(self.held))]
        self.held[token] = experts


@given(
    tokens=st.integers(1, 6),
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2**31)), max_size=40),
    asked=st.lists(st.integers(0, 9), max_size=12),
)
@settings(max_examples=80, deadline=None)
def test_a_table_has_what_the_latest_tokens_were_routed_to(tokens, rows, asked):
    table, model = TokenTable(tokens, 3, 2), Latest(tokens)
    for token, seed in rows:
        chosen = np.random.default_rng(seed).integers(0, 60000, (1, 3, 2))
        table.learn(np.array([token]), chosen)
        model.learn(token, chosen[0])
    assert len(table) == len(model.held)
    expected = [model.held[token] for token in asked if token in model.held]
    found = table.find(np.array(asked, np.int64))
    assert found.shape == (len(expected), 3, 2)
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_table_is_bounded():
    assert table_tokens(1000, 4, 2) == 1000
    assert table_tokens(150_000, 40, 8) == TABLE_BYTES // (640 + ENTRY_BYTES)
    assert table_tokens(10, 1000, 100_000) == 1


# --- the trial


def passes(trial, count, costs, stall=0.5):
    """Passes of 10 requests; costs: way -> seconds per request. The ways that had their turn."""
    seen = []
    for _ in range(count):
        seen.append(trial.way)
        seconds = 10 * costs[trial.way]
        trial.passed(seconds, stall * seconds, 10)
    return seen


WHOLE = 3 * TURNS * WINDOW


def test_a_trial_takes_turns_and_keeps_the_fastest():
    trial = Trial(("draft", "layer"))
    costs = {"off": 1.0, "draft": 0.8, "layer": 0.7}
    seen = passes(trial, WHOLE, costs)
    assert {way: seen.count(way) for way in costs} == dict.fromkeys(costs, TURNS * WINDOW)
    assert seen[: WINDOW + 1] == ["off"] * WINDOW + ["draft"]
    assert trial.way == "layer"
    (words,) = trial.words
    assert words.startswith(f"by layer after {WHOLE} passes")
    assert set(passes(trial, PASSES, costs)) == {"layer"}
    assert trial.way == "off"  # and again, from time to time
    passes(trial, WHOLE, costs)
    assert set(passes(trial, 2 * PASSES, costs)) == {"layer"}  # later and later
    changed = {"off": 1.0, "draft": 1.1, "layer": 1.2}
    passes(trial, WHOLE, changed)
    assert trial.way == "off"
    assert trial.words[-1].startswith("off after")


def test_a_way_that_hardly_gains_is_no_way():
    trial = Trial(("draft",))
    passes(trial, 2 * TURNS * WINDOW, {"off": 1.0, "draft": 0.96})
    assert trial.way == "off"


def test_a_hopeless_way_gets_one_turn():
    trial = Trial(("draft", "layer"))
    seen = passes(trial, 3 * WINDOW + 1, {"off": 1.0, "draft": 2.0, "layer": 3.0})
    assert [seen.count(way) for way in ("draft", "layer")] == [WINDOW, WINDOW]
    assert trial.way == "off"


def test_nothing_is_tried_where_nobody_waits():
    trial = Trial(("draft", "layer"))
    seen = passes(trial, WINDOW + PASSES, {"off": 1.0}, stall=0.05)
    assert set(seen) == {"off"}
    assert trial.words == [f"off after {WINDOW} passes (5 % of the time is waiting for reads)"]


def test_passes_after_a_change_of_ways_do_not_count():
    trial = Trial(("draft",))
    for at in range(2 * TURNS * WINDOW):
        slow = at % WINDOW < SETTLING
        trial.passed(100.0 if slow else 1.0 - 0.2 * (trial.way == "draft"), 0.9, 1)
    assert trial.way == "draft"


# --- guesses in a session


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("prefetch"), "qwen3_next")


def session(target, rounds=6, pause=0.0):
    """Rounds of a tree, whose tokens repeat."""
    rng = np.random.default_rng(2)
    found = [logits_of(prefill(target, PROMPT, 16))]
    for _ in range(rounds):
        tree = tree_of(rng.integers(0, 40, 5), [-1, 0, 0, 1, 3])
        target.foresee(tree_of(tree.tokens[:1], [-1]))
        target.foresee(tree)
        time.sleep(pause)
        found.append(logits_of(target.verify(tree)))
        target.commit([0, 1, 3])
    return found, state_bytes(target)


def summed(target, field):
    return sum(getattr(one, field) for one in target.experts.counters())


@each_exact_backend
@pytest.mark.parametrize("prefetch", PREFETCH)
@pytest.mark.parametrize("slots", [1, 7, 12, 20])
def test_the_same_bits_however_experts_are_foreseen(folder, backend, slots, prefetch, monkeypatch):
    monkeypatch.setattr(trial_module, "WAITING", 0.0)  # "auto" tries in any case
    monkeypatch.setattr(trial_module, "WINDOW", 1)
    monkeypatch.setattr(trial_module, "SETTLING", 0)
    with opened(folder, backend) as resident:
        logits, state = session(resident)
    how = Streaming(prefetch=prefetch, protect=(0, 0))
    with opened(folder, backend, pins=1, slots=slots, streaming=how) as target:
        others, other = session(target)
        used = target.prefetcher.use()
    assert other == state
    assert all(same_bits(a, b) for a, b in zip(logits, others, strict=True))
    ways = {"auto": {"off", "draft", "layer"}, "off": set()}.get(prefetch, {prefetch})
    assert set(used.passes) == ways
    assert sum(used.passes.values()) == (6 if ways else 0)


@pytest.mark.parametrize("way", [DRAFT, LAYER])
@pytest.mark.parametrize("backend", [REFERENCE, pytest.param(CPU, marks=needs_numba)], ids=str)
def test_guesses_are_read_and_come_true(folder, backend, way):
    how = Streaming(prefetch=way, protect=(0, 0))
    with opened(folder, backend, pins=1, slots=16, streaming=how) as target:
        session(target, rounds=12, pause=0.005)
        assert summed(target, "early") > 0
        assert summed(target, "early_hits") + summed(target, "late") > 0
        assert target.prefetcher.guesses.chance(way) != 0.5


def test_the_layer_guess_is_read_back_with_the_routing(folder):
    """With room for all there is one wait per unpinned layer and pass, guesses or not."""
    waits = []
    for way in ("off", LAYER):
        how = Streaming(prefetch=way, prefetch_bytes=1 << 20)
        with opened(folder, REFERENCE, pins=1, slots=24, streaming=how) as target:
            session(target)
            waits.append(summed(target, "synchronizations"))
            passes = max(one.passes for one in target.experts.counters())
            unpinned = sum(not one.pinned for one in target.experts.counters())
            assert waits[-1] == passes * unpinned
    assert waits[0] == waits[1]


def test_a_cap_in_bytes_is_kept_per_pass(folder):
    with opened(folder, REFERENCE, pins=0, slots=32) as target:
        cache = target.experts
        each = cache.store.geometry(0).bytes_on_disk
        cache.streaming = Streaming(prefetch=DRAFT, prefetch_bytes=3 * each)
        prefetcher = Prefetcher(cache, 320)
        chosen = {layer: np.array([[0, 1]]) for layer in prefetcher.layers}
        prefetcher.learn(np.array([7]), chosen)
        prefetcher.foresee(np.array([7]))
        prefetcher.foresee(np.array([7]))
        assert summed(target, "early") == 3
        prefetcher.passed()
        prefetcher.foresee(np.array([7]))
        assert summed(target, "early") == 6


def test_without_a_cap_a_layer_reads_ahead_what_it_lately_missed(folder):
    how = Streaming(prefetch=DRAFT)
    with opened(folder, REFERENCE, pins=0, slots=32, streaming=how) as target:
        prefetcher, cache = target.prefetcher, target.experts
        chosen = {layer: np.array([[0, 1]]) for layer in prefetcher.layers}
        prefetcher.learn(np.array([7]), chosen)
        prefetcher.foresee(np.array([7]))
        assert summed(target, "early") == 0  # nothing is known to be missed
        layer = prefetcher.layers[-1]
        list(cache.waves(layer, np.array([5])))
        prefetcher.passed()
        prefetcher.foresee(np.array([7]))
        counters = {one.layer: one.early for one in cache.counters()}
        assert counters.pop(layer) == 1
        assert not any(counters.values())


def test_a_prompt_teaches_and_is_not_foreseen(folder):
    how = Streaming(prefetch=DRAFT, prefetch_bytes=1 << 30)
    with opened(folder, REFERENCE, pins=1, slots=20, streaming=how) as target:
        prefill(target, PROMPT, 16)
        assert summed(target, "early") == 0
        assert target.prefetcher.tokens == len(set(PROMPT))


def test_rejected_rows_teach_nothing(folder):
    how = Streaming(prefetch=DRAFT)
    with opened(folder, REFERENCE, pins=1, slots=20, streaming=how) as target:
        prefill(target, [1, 2, 3])
        target.verify(tree_of([4, 5, 6], [-1, 0, 0]))
        target.commit([0, 2])
        table = target.prefetcher._table
        assert len(table.find(np.array([4, 6]))) == 2
        assert len(table.find(np.array([5]))) == 0


def test_with_all_layers_pinned_nothing_is_foreseen(folder):
    with opened(folder, REFERENCE, streaming=Streaming(prefetch="auto")) as target:
        session(target, rounds=2)
        assert target.prefetcher.use().way == "off"
        assert target.prefetcher._table is None


def test_the_chance_of_a_guess_is_the_share_that_came_true(folder):
    with opened(folder, REFERENCE, pins=0, slots=32, streaming=Streaming(prefetch=DRAFT)) as target:
        guesses = target.prefetcher.guesses
        assert guesses.chance(DRAFT) == 0.5
        guesses.begun(0, DRAFT, np.array([1, 2, 3]))
        list(target.experts.waves(0, np.array([1, 4], np.int32)))
        assert guesses.chance(DRAFT) == pytest.approx(1.5 / 4)
        list(target.experts.waves(0, np.array([2], np.int32)))  # counted once
        assert guesses.chance(DRAFT) == pytest.approx(1.5 / 4)
