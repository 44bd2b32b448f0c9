"""--budget auto and --max-budget, from the command line to the engine and into every report."""

import pytest

import specdec.generation
from specdec.demo_pair import demo_pair
from specdec.load import load
from tests.commands import PROMPT, fails, recorded, run
from tests.pairs import write_pair

LONG = ("--max-tokens", "150", "--ignore-eos")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("auto"))


def test_the_options_reach_the_engine(pair, tmp_path, monkeypatch):
    seen = {}
    true_generate = specdec.generation.generate

    def spy_load(settings, **callbacks):
        seen["settings"] = settings
        return load(settings, **callbacks)

    def spy_generate(engine, tokenizer, request, *callbacks):
        seen["request"] = request
        return true_generate(engine, tokenizer, request, *callbacks)

    monkeypatch.setattr("specdec.load.load", spy_load)
    monkeypatch.setattr(specdec.generation, "generate", spy_generate)
    arguments = ("generate", *pair.options, *PROMPT, "--max-tokens", "9", "--budget", "auto")
    for options, nodes in (((), 16), (("--max-budget", "5"), 5)):
        _, document = recorded(tmp_path, *arguments, *options)
        assert seen["settings"].budget == nodes  # what memory is planned for
        assert (seen["request"].budget, seen["request"].max_budget) == ("auto", nodes)
        assert document["settings"]["budget"] == "auto"
        assert document["settings"]["max_budget"] == nodes
        assert list(document["runs"]) == ["speculative"]
        (one,) = document["runs"].values()
        assert all(len(round["tokens"]) <= nodes + 1 for round in one["rounds"])
    done, _ = recorded(tmp_path, *arguments[:-1], "3", "--max-budget", "9", "-q")
    assert (seen["settings"].budget, seen["request"].budget) == (3, 3)
    assert done.stderr == "note: --max-budget without effect: it limits --budget auto alone\n"
    done, _ = recorded(tmp_path, *arguments, "--max-budget", "9", "-q")
    assert "--max-budget" not in done.stderr


@pytest.mark.parametrize("options", [(), ("--temp", "0.9", "--seed", "5")], ids=["greedy", "warm"])
@pytest.mark.parametrize("place", [(), ("--pin-layers", "1", "--cache-slots", "9")])
def test_the_tokens_of_plain_decoding(pair, tmp_path, options, place):
    arguments = ("generate", *pair.options, *PROMPT, *LONG, *options, *place)
    tokens = [
        next(iter(recorded(tmp_path, *arguments, "--budget", budget)[1]["runs"].values()))["tokens"]
        for budget in ("1", "auto")
    ]
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 150


def test_going_without_drafting_is_told_once(pair, tmp_path):
    """A random draft is never right: it is tried, and given up."""
    arguments = ("generate", *pair.options, *PROMPT, *LONG, "--budget", "auto", "--quiet")
    done, document = recorded(tmp_path, *arguments)
    (one,) = document["runs"].values()
    reason = one["metrics"]["plain_reason"]
    assert "plain decoding" in reason
    assert done.stderr.count("--budget auto decoded") == done.stderr.count(reason) == 1
    sizes = dict(one["metrics"]["tree_sizes"])
    assert sum(sizes.values()) == len(one["rounds"]) == one["metrics"]["rounds"]
    assert sizes[0] > len(one["rounds"]) / 2
    drafted = [at for at, round in enumerate(one["rounds"]) if round["budget"] > 1]
    assert drafted
    assert all(round["budget"] in (1, 16) for round in one["rounds"])
    done, document = recorded(tmp_path, *arguments[:-3], "--budget", "1")
    (one,) = document["runs"].values()
    assert one["metrics"]["plain_reason"] is None
    assert one["metrics"]["tree_sizes"] == [[0, 149]]


def test_without_a_draft_there_is_nothing_to_choose(pair, tmp_path):
    arguments = ("generate", "-m", pair.target, *PROMPT, "--max-tokens", "4", "--budget", "auto")
    done, document = recorded(tmp_path, *arguments)
    assert "no --draft: plain decoding, budget 1" in done.stderr
    assert list(document["runs"]) == ["autoregressive"]
    assert document["settings"]["budget"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--budget", "many"), ("--budget", "auto")),
        (("--budget", "0"), ("1<=x<=256", "auto")),
        (("--budget", "auto", "--max-budget", "1"), ("--max-budget", "2<=x<=256")),
        (("--budget", "auto", "--max-budget", "257"), ("--max-budget", "2<=x<=256")),
    ],
)
def test_other_budgets_are_refused(pair, options, words):
    done = run("generate", *pair.options, *PROMPT, *options)
    assert done.exit_code == 2
    assert all(word in done.stderr for word in words)
    assert done.stdout == ""


def test_what_the_largest_tree_needs_is_planned(pair):
    """A cap that holds for small trees and not for large ones."""
    arguments = ("generate", *pair.options, *PROMPT, "--max-tokens", "4", "--budget", "auto")
    done = run(*arguments, "--max-budget", "200", "--memory-gb", "0.001")
    assert fails(done, "the memory plan needs", "--budget")


def test_bench_takes_auto_among_its_budgets(pair, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "p", "class": "a", "prompt": "the sea"}\n')
    arguments = ("bench", *pair.options, "--prompts", prompts, "--repeat", "1", "--ignore-eos")
    done, document = recorded(
        tmp_path, *arguments, "--budgets", "1,auto", "--max-tokens", "40", "--max-budget", "3"
    )
    assert document["budgets"] == [1, "auto"]
    assert document["tokens_equal"] is True
    auto = next(one for one in document["runs"] if one["budget"] == "auto")
    assert all(len(round["tokens"]) <= 4 for round in auto["rounds"] if "tokens" in round)
    assert any(round["budget"] == 3 for round in auto["rounds"])
    assert "auto" in done.stdout


def test_on_the_demo_pair_compared(tmp_path):
    demo_pair()
    arguments = ("generate", "--budget", "auto", "--max-tokens", "100", "--compare", "--ignore-eos")
    done, document = recorded(tmp_path, *arguments)
    assert document["comparison"]["tokens_equal"] is True
    metrics = document["runs"]["speculative"]["metrics"]
    assert metrics["drafted"] > 0
    assert "rounds by nodes verified" in done.stderr
