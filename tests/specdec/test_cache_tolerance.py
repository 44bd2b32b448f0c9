"""--cache-tolerance from end to end: exact at 0, not exact and said so above."""

import json

import pytest

from specdec.generation import Request, generate
from specdec.load import Settings, load
from specdec.metrics import measure
from tests.commands import PROMPT, recorded, run
from tests.pairs import write_pair

FEW = ["--pin-layers", "1", "--cache-slots", "9"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


def made(pair, tolerance, slots=9, pins=1, budget=1, tokens=30, kernels=None):
    loaded = load(
        Settings(
            str(pair.target),
            str(pair.draft),
            context=64,
            cache_slots=slots,
            pin_layers=pins,
            cache_tolerance=tolerance,
            kernels=kernels,
        )
    )
    request = Request((1, 2, 3, 4), budget, max_tokens=tokens)
    return generate(loaded.engine, loaded.tokenizer, request)


@pytest.mark.parametrize("kernels", [None, "reference"])
@pytest.mark.parametrize("budget", [1, 4])
def test_substitutions_save_reads_and_are_counted(pair, budget, kernels):
    exact, loose = (made(pair, t, budget=budget, kernels=kernels) for t in (0.0, 2.0))
    assert exact.substitutions is None
    assert measure(exact).substitutions is None
    told = measure(loose).substitutions
    assert told is not None
    assert 0 < told.substituted <= told.choices
    assert told.rate == told.substituted / told.choices
    assert told.per_token == told.substituted / 30
    assert told.kl is not None
    assert told.kl > 0
    misses = [measure(one).experts.misses / len(one.rounds) for one in (exact, loose)]
    assert misses[1] < misses[0]


def test_with_everything_cached_nothing_changes(pair):
    exact, slots, pins = (
        made(pair, 0.0),
        made(pair, 5.0, slots=32, pins=0, tokens=30),
        made(pair, 5.0, pins=4),
    )
    assert pins.tokens == exact.tokens
    told = measure(pins).substitutions
    assert told is not None
    assert (told.choices, told.substituted, told.kl) == (0, 0, None)
    assert slots.substitutions is not None  # slots fill as they are used: not all cached at first


def test_top_1_works(tmp_path):
    pair = write_pair(tmp_path, num_experts_per_tok=1)
    told = measure(made(pair, 0.5)).substitutions
    assert told is not None
    assert told.choices > 0


def test_it_is_said_everywhere(pair, tmp_path):
    arguments = ["generate", *pair.options, *PROMPT, "--max-tokens", "20", "--ignore-eos", *FEW]
    loose = ["--cache-tolerance", "2"]
    done, document = recorded(tmp_path, *arguments, *loose)
    assert "NOT EXACT" in done.stderr.split("speculative\n")[0]  # before the run
    assert "choices substituted" in done.stderr
    assert document["environment"]["exact"] is False
    assert document["settings"]["cache_tolerance"] == 2.0
    assert document["runs"]["speculative"]["metrics"]["substitutions"]["substituted"] > 0
    quiet = run(*arguments, *loose, "--quiet")
    assert "NOT EXACT" in quiet.stderr
    exact, document = recorded(tmp_path, *arguments, "--cache-tolerance", "0")
    assert "NOT EXACT" not in exact.stderr
    assert document["environment"]["exact"] is True
    assert document["runs"]["speculative"]["metrics"]["substitutions"] is None
    plain = recorded(tmp_path, *arguments)[1]["runs"]["speculative"]
    assert plain["tokens"] == document["runs"]["speculative"]["tokens"]


def test_a_comparison_may_differ_and_says_so(pair, tmp_path):
    arguments = ["generate", *pair.options, *PROMPT, "--max-tokens", "40", "--ignore-eos", *FEW]
    done, _ = recorded(tmp_path, *arguments, "--cache-tolerance", "3", "--compare")
    assert done.exit_code == 0
    assert done.stderr.count("choices substituted") == 2


def test_a_bench_says_so(pair, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": "a", "class": "a", "prompt": "the sea"}))
    done, document = recorded(
        tmp_path,
        *("bench", *pair.options, "--prompts", prompts, "--budgets", "1,3", "--repeat", "1"),
        *("--max-tokens", "20", "--cache-tolerance", "2", "--ignore-eos", *FEW),
    )
    assert "NOT EXACT (--cache-tolerance):" in done.stdout
    assert document["environment"]["exact"] is False
    assert document["runs"][0]["metrics"]["substitutions"]["choices"] > 0
