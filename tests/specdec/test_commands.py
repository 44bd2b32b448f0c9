"""The commands from end to end, on a tiny random pair."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest

import specdec.generation
from specdec.draft import doctor
from specdec.load import load
from specdec.target.streaming import Streaming
from specdec.tokenizer import Tokenizer
from tests.commands import PROMPT, fails, recorded, run
from tests.pairs import write_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


# --- generate


def test_text_goes_to_stdout_and_nothing_else(pair, tmp_path):
    done, document = recorded(tmp_path, "generate", *pair.options, *PROMPT, "--max-tokens", "20")
    assert list(document["runs"]) == ["speculative"]
    one = document["runs"]["speculative"]
    assert done.stdout == one["text"]
    assert len(one["tokens"]) == one["metrics"]["generated_tokens"] <= 20
    for words in ("memory plan", "pinned experts", "decode", "mean length", "sha256", "planned"):
        assert words in done.stderr


def test_quiet_leaves_stderr_empty(pair):
    done = run("generate", *pair.options, *PROMPT, "--max-tokens", "4", "--quiet")
    assert done.exit_code == 0
    assert done.stderr == ""
    assert done.stdout


@pytest.mark.parametrize("tree", ["best-first", "chain", "spine"])
@pytest.mark.parametrize(
    "memory", [["--pin-layers", "4"], ["--pin-layers", "1", "--cache-slots", "3"]]
)
def test_compare_agrees_for_every_tree_and_cache(pair, tmp_path, tree, memory):
    done, document = recorded(
        tmp_path,
        *("generate", *pair.options, *PROMPT, "--max-tokens", "24", "--ignore-eos"),
        *("--compare", "--budget", "5", "--tree", tree, *memory),
    )
    assert list(document["runs"]) == ["autoregressive", "speculative"]
    plain, fast = document["runs"].values()
    assert plain["tokens"] == fast["tokens"]
    assert len(plain["tokens"]) == 24
    assert document["comparison"]["tokens_equal"] is True
    assert document["comparison"]["speedup"] > 0
    assert all(one["parents"] == [-1] for one in plain["rounds"])
    assert any(len(one["parents"]) > 1 for one in fast["rounds"])
    assert done.stdout == fast["text"]
    assert "autoregressive  speculative" in done.stderr
    assert "tokens      equal" in done.stderr


def test_runs_that_disagree_exit_1(pair, tmp_path, monkeypatch):
    """A broken engine: the speculative run emits another third token."""
    true = specdec.generation.generate

    def broken(engine, tokenizer, request, *callbacks):
        result = true(engine, tokenizer, request, *callbacks)
        if request.budget == 1:
            return result
        first, second, third, *rest = result.tokens
        return replace(result, tokens=(first, second, third ^ 1, *rest))

    monkeypatch.setattr(specdec.generation, "generate", broken)
    path = tmp_path / "run.json"
    arguments = [*pair.options, *PROMPT, "--max-tokens", "8", "--ignore-eos"]
    done = run("generate", *arguments, "--compare", "--quiet", "--json", path)
    assert done.exit_code == 1
    assert "error: speculative and autoregressive tokens differ from position 2 on" in done.stderr
    assert json.loads(path.read_text())["comparison"]["first_difference"] == 2


def test_a_comparison_warms_up_both_ways_first(pair, tmp_path, monkeypatch):
    true, seen = specdec.generation.generate, []

    def spy(engine, tokenizer, request, *callbacks):
        seen.append((request.budget, len(request.prompt_tokens), request.max_tokens))
        return true(engine, tokenizer, request, *callbacks)

    monkeypatch.setattr(specdec.generation, "generate", spy)
    arguments = [*pair.options, "--raw", "-p", "ab " * 30, "--max-tokens", "12", "--budget", "3"]
    done, document = recorded(tmp_path, "generate", *arguments, "--compare")
    (_, prompt, _), *_ = seen[2:]
    assert prompt > 32
    assert seen == [(1, 32, 8), (3, 32, 8), (1, prompt, 12), (3, prompt, 12)]
    assert "order: a short warm-up, autoregressive, speculative" in done.stderr
    assert document["comparison"]["order"] == ["autoregressive", "speculative"]


def test_the_tokenizer_is_read_once(pair, monkeypatch):
    true, opened = Tokenizer.open, []

    def spy(folder):
        opened.append(folder)
        return true(folder)

    monkeypatch.setattr(Tokenizer, "open", spy)
    assert run("generate", *pair.options, *PROMPT, "--max-tokens", "2").exit_code == 0
    assert opened == [pair.target]


def test_every_streaming_option_reaches_the_cache(pair, tmp_path, monkeypatch):
    """From the command line to the cache that reads, and into every report."""
    seen = []
    true_generate = specdec.generation.generate

    def spy(engine, tokenizer, request, *callbacks):
        seen.append(engine.target)
        return true_generate(engine, tokenizer, request, *callbacks)

    monkeypatch.setattr(specdec.generation, "generate", spy)
    arguments = ("generate", *pair.options, *PROMPT, "--max-tokens", "6", "--ignore-eos")
    slots = ("--pin-layers", "1", "--cache-slots", "9")
    tokens = []
    for options, expected in (
        ((), Streaming(rows=7)),
        (("--io", "direct"), Streaming(direct=True, rows=7)),
        (("--queue-depth", "3", "--budget", "1"), Streaming(queue_depth=3, rows=1)),
        (("--policy", "s3-fifo"), Streaming(policy="s3-fifo", rows=7)),
        (("--protect", "2,0"), Streaming(protect=(2, 0), rows=7)),
        (
            ("--prefetch", "layer", "--prefetch-mb", "3"),
            Streaming(prefetch="layer", prefetch_bytes=3_000_000, rows=7),
        ),
    ):
        done, document = recorded(tmp_path, *arguments, *slots, *options)
        assert seen[-1].experts.streaming == expected
        assert seen[-1].clock is None
        assert done.stderr.count(str(expected)) == 2  # in the plan and in the figures
        (run,) = document["runs"].values()
        experts = run["metrics"]["experts"]
        found = [experts[name] for name in ("io", "queue_depth", "policy", "protect")]
        protect = list(expected.protect)
        assert found == [expected.io, expected.queue_depth, expected.policy, protect]
        assert experts["read_bandwidth"] > 0
        assert experts["bytes_per_round"] > 0
        # One for the routing of each unpinned layer; waves of few slots take more.
        assert experts["synchronizations_per_pass"] >= 3
        tokens.append(run["tokens"])
    assert all(one == tokens[0] for one in tokens)


def test_pinned_layers_wait_for_nothing(pair, tmp_path):
    arguments = ("generate", *pair.options, *PROMPT, "--max-tokens", "6", "--ignore-eos")
    _, document = recorded(tmp_path, *arguments, "--pin-layers", "4")
    assert document["runs"]["speculative"]["metrics"]["experts"]["stall_seconds"] == 0
    assert document["runs"]["speculative"]["metrics"]["experts"]["bytes_per_round"] == 0
    _, document = recorded(tmp_path, *arguments, "--pin-layers", "1", "--cache-slots", "24")
    experts = document["runs"]["speculative"]["metrics"]["experts"]
    assert experts["synchronizations_per_pass"] == 3


def test_auto_is_what_fits(pair, tmp_path):
    arguments = ("generate", *pair.options, *PROMPT, "--max-tokens", "2")
    plans = [
        recorded(tmp_path, *arguments, *options)[1]["plan"]
        for options in ((), ("--pin-layers", "auto", "--cache-slots", "auto"))
    ]
    assert plans[0]["pinned"] == plans[1]["pinned"]
    assert plans[0]["slots"] == plans[1]["slots"]
    for option, value, words in (
        ("--pin-layers", "some", "not a valid integer"),
        ("--protect", "3", "two counts"),
        ("--protect", "3,-1", "-1"),
    ):
        done = run(*arguments, option, value)
        assert done.exit_code == 2
        assert option in done.stderr
        assert words in done.stderr


def test_timing_prints_a_line_per_layer(pair, tmp_path):
    arguments = ("generate", *pair.options, *PROMPT, "--max-tokens", "6", "--ignore-eos")
    done, document = recorded(
        tmp_path, *arguments, "--timing", "--pin-layers", "1", "--cache-slots", "9"
    )
    one = document["runs"]["speculative"]["metrics"]["experts"]
    assert [layer["layer"] for layer in one["layer_seconds"]] == [0, 1, 2, 3]
    assert all(layer["mixer"] > 0 and layer["experts"] > 0 for layer in one["layer_seconds"])
    assert one["layer_seconds"][0]["io_wait"] == 0
    waited = sum(layer["io_wait"] for layer in one["layer_seconds"])
    assert waited == pytest.approx(one["stall_seconds"])
    assert re.search(
        r"^timing +layer +kind +mixer ms +I/O wait ms +experts ms +hit$", done.stderr, re.M
    )
    assert re.search(r"^ +all +\d", done.stderr, re.MULTILINE)
    _, document = recorded(tmp_path, *arguments)
    assert document["runs"]["speculative"]["metrics"]["experts"]["layer_seconds"] is None


def test_every_option_arrives(pair, tmp_path, monkeypatch):
    seen = {}
    true_load, true_generate = load, specdec.generation.generate

    def spy_load(settings, **callbacks):
        seen["settings"] = settings
        return true_load(settings, **callbacks)

    def spy_generate(engine, tokenizer, request, *callbacks):
        seen["request"], seen["chunk"] = request, engine.prefill_chunk
        return true_generate(engine, tokenizer, request, *callbacks)

    monkeypatch.setattr("specdec.load.load", spy_load)
    monkeypatch.setattr(specdec.generation, "generate", spy_generate)
    _, document = recorded(
        tmp_path,
        *("generate", *pair.options, *PROMPT, "--max-tokens", "7", "--budget", "3"),
        *("--tree", "spine", "--pin-layers", "2", "--cache-slots", "5", "--memory-gb", "3"),
        *("--prefill-chunk", "4", "--stop", "qqq", "--stop", "zzz"),
    )
    settings, request = seen["settings"], seen["request"]
    assert (settings.model, settings.draft) == (str(pair.target), str(pair.draft))
    assert (settings.pin_layers, settings.cache_slots, settings.memory_gb) == (2, 5, 3.0)
    assert (settings.prefill_chunk, settings.budget, seen["chunk"]) == (4, 3, 4)
    assert settings.context == len(request.prompt_tokens) + 7
    assert (request.budget, request.tree, request.max_tokens) == (3, "spine", 7)
    assert request.stop == ("qqq", "zzz")
    assert request.eos_ids == (319,)
    assert (len(document["plan"]["pinned"]), document["plan"]["slots"]) == (2, 5)
    assert document["plan"]["cap"] == 3_000_000_000
    assert document["settings"]["tree"] == "spine"
    recorded(tmp_path, "generate", *pair.options, *PROMPT, "--max-tokens", "2", "--ignore-eos")
    assert seen["request"].eos_ids == ()


def test_stop_ends_the_text_before_it(pair, tmp_path):
    arguments = ["generate", *pair.options, *PROMPT, "--max-tokens", "40", "--ignore-eos"]
    whole = run(*arguments).stdout
    stop = whole[10:13]
    done, document = recorded(tmp_path, *arguments, "--stop", stop)
    assert done.stdout == whole[: whole.index(stop)]
    assert document["runs"]["speculative"]["metrics"]["finish"] == "stop"


def test_the_chat_template_is_used_unless_raw(pair, tmp_path):
    arguments = ["generate", *pair.options, "-p", "hi", "--max-tokens", "1"]
    chat = recorded(tmp_path, *arguments, "--system", "be brief")[1]["prompt"]
    assert chat == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert recorded(tmp_path, *arguments, "--raw")[1]["prompt"] == "hi"


def test_the_prompt_from_a_file_and_from_stdin(pair, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("two\nlines")
    arguments = ["generate", *pair.options, "--raw", "--max-tokens", "1"]
    from_file = recorded(tmp_path, *arguments, "--prompt-file", path)[1]
    assert from_file["prompt"] == "two\nlines"
    target = tmp_path / "stdin.json"
    done = run(*arguments, "-p", "-", "--json", target, input="two\nlines")
    assert done.exit_code == 0
    assert json.loads(target.read_text())["prompt"] == "two\nlines"


def test_without_draft_the_budget_falls_to_1_and_says_so(pair, tmp_path):
    arguments = ["generate", "--model", pair.target, *PROMPT, "--max-tokens", "4", "--quiet"]
    done, document = recorded(tmp_path, *arguments)
    assert "no --draft: plain decoding, budget 1" in done.stderr
    assert list(document["runs"]) == ["autoregressive"]
    assert document["settings"]["budget"] == 1


def test_expert_traffic_is_told(pair, tmp_path):
    few = ["--pin-layers", "1", "--cache-slots", "2"]
    arguments = ["generate", *pair.options, *PROMPT, "--max-tokens", "8", "--ignore-eos"]
    experts = recorded(tmp_path, *arguments, *few)[1]["runs"]["speculative"]["metrics"]["experts"]
    assert experts["misses"] > 0
    assert experts["pinned_requests"] > 0
    assert experts["bytes_read"] == sum(one["bytes_read"] for one in experts["layers"]) > 0
    assert experts["layers"][0] | {"hits": 0} == {
        "layer": 0,
        "pinned": True,
        "hits": 0,
        "misses": 0,
        "hit_rate": 1.0,
        "bytes_read": 0,
        "evictions": 0,
        "stall_seconds": 0.0,
    }
    assert experts["hit_rate"] < experts["effective_hit_rate"] < 1


def test_generate_imports_only_what_it_needs(pair):
    code = """
import sys
from specdec.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert end.code == 0, end.code
needless = {"scipy.stats", "scipy.optimize", "huggingface_hub", "transformers", "mlx_lm", "torch",
    "httpx", "requests", "tqdm"} & set(sys.modules)
assert not needless, needless
"""
    arguments = ["generate", *pair.options, *PROMPT, "--max-tokens", "2", "-q"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# --- the other commands


def test_bench(pair, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"id": f"p{i}", "class": kind, "prompt": "the sea"} for i, kind in enumerate("aab")]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done, document = recorded(
        tmp_path,
        *("bench", *pair.options, "--prompts", prompts, "--budgets", "1,3", "--repeat", "2"),
        *("--max-tokens", "6", "--ignore-eos", "--kernels", "reference"),
    )
    assert document["environment"]["kernels"] == "reference"
    assert document["tokens_equal"] is True
    assert len(document["runs"]) == 3 * 2 * 2
    groups = {(one["class"], one["budget"]): one for one in document["groups"]}
    assert set(groups) == {(kind, budget) for kind in ("a", "b", "all") for budget in (1, 3)}
    assert groups["all", 3]["speedup"] > 0
    assert re.search(r"^a \(2 prompts, 2 repeats\)$", done.stdout, re.MULTILINE)
    assert "tokens equal over all budgets" in done.stdout
    assert "memory plan" in done.stderr


def test_bench_names_the_prompt_that_is_too_long(pair, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    line = {"id": "huge", "class": "a", "prompt": "ab " * 5000}
    prompts.write_text(json.dumps(line))
    done = run("bench", *pair.options, "--prompts", prompts)
    assert fails(done, "prompt 'huge'", "4096")


def test_inspect(pair):
    done = run("inspect", pair.target, "--draft", pair.draft, "--pin-layers", "3")
    assert done.exit_code == 0, done.stderr
    for words in ("qwen3_5_moe", "3 linear attention", "8 in each of 4 layers", "4 bits, group"):
        assert words in done.stdout
    assert re.search(r"^experts +\d+ +[\d.]+ kB +12 x 4 bits", done.stdout, re.MULTILINE)
    assert re.search(r"^pinned experts .* 3 of 4 layers", done.stdout, re.MULTILINE)
    assert re.search(r"^total ", done.stdout, re.MULTILINE)


def test_doctor_tells_a_random_draft(pair):
    done = run("doctor", pair.target, pair.draft, "--positions", "20")
    assert done.exit_code == 1, done.stderr
    assert "slot 1:" in done.stdout
    assert "Too low: first-slot agreement" in done.stdout
    # The measured tokens are the target's own: later slots count wherever there is a next token.
    assert re.search(r"slot 1: [\d.]+ % \(\d+ of 20\)", done.stdout)
    assert re.search(r"slot 2: [\d.]+ % \(\d+ of 19\)", done.stdout)


@pytest.mark.parametrize("thorough", [True, False])
def test_doctor_is_as_thorough_as_asked(pair, monkeypatch, thorough):
    true, seen = doctor.examine, []

    def spy(*arguments, **options):
        seen.append(options["thorough"])
        return true(*arguments, **options)

    monkeypatch.setattr(doctor, "examine", spy)
    options = ["--positions", "3", *(["--thorough"] if thorough else [])]
    assert run("doctor", pair.target, pair.draft, *options).exit_code in (0, 1)
    assert seen == [thorough]


# --- the demo pair


def test_without_a_model_the_demo_pair_runs(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("specdec.demo_pair.TARGET", pair.target)
    monkeypatch.setattr("specdec.demo_pair.DRAFT", pair.draft)
    _, document = recorded(tmp_path, "generate", "--max-tokens", "3", "--raw")
    assert document["prompt"].startswith("import os")
    assert document["settings"]["budget"] == 6
    assert list(document["runs"]) == ["speculative"]
    assert run("inspect").exit_code == 0
    done = run("bench", "--budgets", "1,2", "--repeat", "1", "--max-tokens", "2", "-q")
    assert done.exit_code == 0, done.stderr
    assert "code (" in done.stdout
    assert "prose (" in done.stdout
    assert run("doctor", "--positions", "3", "-q").exit_code in (0, 1)


def test_an_installation_without_the_demo_pair_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("specdec.demo_pair.TARGET", tmp_path)
    assert fails(run("generate"), str(tmp_path), "demo pair", "--model")
