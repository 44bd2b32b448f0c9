"""Sampling through the command line: every flag arrives, seeds reproduce, nonsense is refused."""

import re

import pytest

import specdec.generation
from specdec.sampling import GREEDY, Sampling
from tests.commands import PROMPT, recorded, run
from tests.pairs import write_pair

EVERY = Sampling(
    temperature=0.9,
    top_p=0.97,
    top_k=30,
    min_p=0.001,
    repetition_penalty=1.2,
    seed=2**63,
    accept="swor",
)
EVERY_OPTION = [
    *("--temp", "0.9", "--top-p", "0.97", "--top-k", "30", "--min-p", "0.001"),
    *("--repetition-penalty", "1.2", "--seed", str(2**63), "--accept", "swor"),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def asked(monkeypatch):
    """The samplings that reach the engine."""
    seen = []
    true_prefill = specdec.generation.Engine.prefill

    def spy(engine, tokens, drafting, on_progress, sampling):
        seen.append(sampling)
        return true_prefill(engine, tokens, drafting, on_progress, sampling)

    monkeypatch.setattr(specdec.generation.Engine, "prefill", spy)
    return seen


def generate(pair, *arguments):
    return ["generate", *pair.options, *PROMPT, "--ignore-eos", "--max-tokens", "24", *arguments]


def text_of(document, name="speculative"):
    return document["runs"][name]["tokens"]


def test_every_flag_reaches_the_engine_and_the_record(pair, tmp_path, asked):
    done, document = recorded(tmp_path, *generate(pair, *EVERY_OPTION))
    assert asked == [EVERY]
    assert document["runs"]["speculative"]["metrics"]["sampling"] == vars(EVERY)
    assert document["settings"]["seed"] == EVERY.seed
    assert document["settings"]["temp"] == 0.9
    assert f"sampling    {EVERY}\n" in done.stderr
    done, document = recorded(tmp_path, *generate(pair))
    assert asked[1:] == [GREEDY]
    assert "sampling    greedy\n" in done.stderr


def test_bench_takes_the_same_flags(pair, tmp_path, asked):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "p", "class": "a", "prompt": "the sea"}\n')
    flags = ["--temps", "0,0.9", *EVERY_OPTION[2:]]
    arguments = ["bench", *pair.options, "--prompts", prompts, "--max-tokens", "3"]
    recorded(tmp_path, *arguments, "--budgets", "3", "--repeat", "1", *flags)
    assert EVERY in asked
    assert {one.temperature for one in asked} == {0.0, 0.9}
    assert {one.accept for one in asked if one.temperature == 0.0} == {"match"}
    recorded(tmp_path, *arguments, "--budgets", "1", "--repeat", "1", "--temp", "0.5")
    assert asked[-1] == Sampling(temperature=0.5)


@pytest.mark.parametrize(
    "flags",
    [
        ["--temp", "1.3", "--seed", "5"],
        ["--temp", "0.8", "--top-p", "0.9", "--repetition-penalty", "1.3", "--seed", "6"],
        ["--repetition-penalty", "1.5"],
        ["--temp", "2", "--top-k", "20", "--min-p", "0.01"],
    ],
    ids=" ".join,
)
def test_tokens_do_not_depend_on_budget_tree_or_cache(pair, tmp_path, flags):
    if "--seed" not in flags:
        flags = [*flags, "--seed", "7"]
    plain = text_of(
        recorded(tmp_path, *generate(pair, *flags, "--budget", "1"))[1], "autoregressive"
    )
    assert len(set(plain)) > 3
    for way in (
        ["--budget", "2"],
        ["--budget", "6", "--tree", "spine", "--pin-layers", "1", "--cache-slots", "3"],
        ["--budget", "12", "--tree", "chain"],
        ["--budget", "auto"],
    ):
        _, document = recorded(tmp_path, *generate(pair, *flags, *way))
        assert text_of(document) == plain, way


def test_demo_pair_emits_the_same_sampled_tokens_for_every_budget(tmp_path):
    """With a draft that is often right, at two temperatures; the sweep compares the hashes."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "p", "class": "python", "prompt": "import os\\n\\n\\ndef read("}\n')
    _, document = recorded(
        tmp_path,
        *("bench", "--prompts", prompts, "--temps", "0.4,1", "--top-p", "0.95", "--seed", "3"),
        *("--repetition-penalty", "1.1", "--budgets", "1,2,6,12,auto", "--repeat", "1"),
        *("--max-tokens", "40", "--ignore-eos"),
    )
    assert document["tokens_equal"] is True
    accepted = [one["metrics"]["accepted"] for one in document["runs"] if one["budget"] == 12]
    assert min(accepted) > 5
    hashes = {one["metrics"]["token_sha256"] for one in document["runs"]}
    assert len(hashes) == 2  # one for each temperature


def test_a_seed_reproduces_and_another_does_not(pair, tmp_path):
    def tokens(*flags):
        return text_of(recorded(tmp_path, *generate(pair, "--temp", "1", *flags))[1])

    for accept in ("match", "swor"):
        first = tokens("--seed", "1", "--accept", accept)
        assert tokens("--seed", "1", "--accept", accept) == first
        assert tokens("--seed", "2", "--accept", accept) != first


def test_a_drawn_seed_is_printed_and_can_be_given_again(pair, tmp_path):
    done, document = recorded(tmp_path, *generate(pair, "--temp", "1"))
    seed = document["settings"]["seed"]
    assert f"sampling    temperature 1, seed {seed}\n" in done.stderr
    again = recorded(tmp_path, *generate(pair, "--temp", "1", "--seed", seed))[1]
    assert text_of(again) == text_of(document)
    other = recorded(tmp_path, *generate(pair, "--temp", "1"))[1]
    assert other["settings"]["seed"] != seed


def test_match_compares_equal_and_swor_says_why_it_does_not(pair, tmp_path):
    flags = ["--temp", "1.2", "--seed", "4", "--compare"]
    done, document = recorded(tmp_path, *generate(pair, *flags))
    assert document["comparison"]["tokens_equal"] is True
    assert "sampling    temperature 1.2, seed 4\n" in done.stderr
    done, document = recorded(tmp_path, *generate(pair, *flags, "--accept", "swor"))
    assert document["comparison"]["tokens_equal"] is False
    assert "differ, as they do with --accept swor" in done.stderr


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--temp", "-0.1"], "--temp"),
        (["--temp", "nan"], "--temp"),
        (["--temp", "inf"], "--temp"),
        (["--top-p", "0"], "--top-p"),
        (["--top-p", "1.01"], "--top-p"),
        (["--top-p", "nan"], "--top-p"),
        (["--top-k", "-1"], "--top-k"),
        (["--top-k", "1.5"], "--top-k"),
        (["--min-p", "1.5"], "--min-p"),
        (["--repetition-penalty", "0"], "--repetition-penalty"),
        (["--repetition-penalty", "inf"], "--repetition-penalty"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**64)], "--seed"),
        (["--accept", "greedy"], "--accept"),
        (["--accept", "swor"], "--temp above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_nonsense_is_refused(pair, flags, word):
    done = run(*generate(pair, *flags))
    assert done.exit_code == 2
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_what_has_no_effect_is_said(pair):
    done = run(*generate(pair, "--top-p", "0.9", "--min-p", "0.1", "--quiet"))
    assert "--top-p, --min-p without effect: at --temp 0" in done.stderr
    plain = run(*generate(pair, "--quiet"))
    assert done.stdout == plain.stdout
    assert plain.stderr == ""
    done = run(*generate(pair, "--temp", "1", "--accept", "swor", "--budget", "1", "--quiet"))
    assert "--accept swor without effect: with --budget 1" in done.stderr
    assert run(*generate(pair, "--seed", "3", "--quiet")).stderr == ""


def test_the_help_says_that_swor_is_not_seed_equal():
    for command in ("generate", "bench"):
        words = re.sub(r"\s+", " ", run(command, "--help").stdout)
        assert "NOT the tokens of --budget 1" in words
