"""The commands from end to end, on a tiny random pair."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner

import specdec.generation
from specdec import checkpoint
from specdec.cli import main
from specdec.load import load
from tests.pairs import write_pair

PROMPT = ["-p", "the rain in spain", "--raw"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def copy(pair, tmp_path):
    """A copy of the pair, to be damaged."""
    for name, folder in pair._asdict().items():
        shutil.copytree(folder, tmp_path / name)
    return type(pair)(tmp_path / "target", tmp_path / "draft")


def run(*arguments, **options):
    """The command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **options)


def recorded(tmp_path, *arguments):
    """The command with --json: (result, document)."""
    path = tmp_path / "run.json"
    done = run(*arguments, "--json", path)
    assert done.exit_code == 0, done.stderr
    return done, json.loads(path.read_text())


def process(*arguments):
    """The command in a process of its own, as it is run from a shell."""
    return subprocess.Popen(
        [sys.executable, "-m", "specdec", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


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
    assert all(one["nodes"] == 0 for one in plain["rounds"])
    assert any(one["nodes"] > 0 for one in fast["rounds"])
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
        "bytes_read": 0,
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


# --- how it ends


@pytest.mark.parametrize("compare", [[], ["--compare"]])
def test_interrupt_prints_the_summary_and_exits_130(pair, tmp_path, compare):
    path = tmp_path / "run.json"
    arguments = [*pair.options, *PROMPT, "--max-tokens", "4000", "--ignore-eos", "--json", path]
    with process("generate", *arguments, *compare) as running:
        if compare:  # the plain run comes first, and prints no text
            while b"order:" not in running.stderr.readline():
                pass
        else:
            running.stdout.read(8)
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert b"Traceback" not in stderr
    assert b"interrupted" in stderr
    if not compare:
        assert b"ended by: interrupted" in stderr
        metrics = json.loads(path.read_text())["runs"]["speculative"]["metrics"]
        assert metrics["finish"] == "interrupted"
        assert 0 < metrics["generated_tokens"] < 4000


def test_a_closed_pipe_ends_quietly(pair):
    arguments = [*pair.options, *PROMPT, "--max-tokens", "2000", "--ignore-eos", "-q"]
    with process("generate", *arguments) as running:
        running.stdout.read(4)
        running.stdout.close()
        stderr = running.stderr.read()
        running.wait(timeout=60)
    assert b"Traceback" not in stderr
    assert running.returncode == 1


def fails(done, *words):
    """One line of error, exit code 2, no traceback, no text."""
    assert done.exit_code == 2, (done.exit_code, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert done.stdout == ""
    return True


def generate(pair, *arguments):
    return run("generate", *pair.options, *PROMPT, "--max-tokens", "2", *arguments)


def test_pins_above_the_layers_are_refused_with_their_number(pair):
    assert fails(generate(pair, "--pin-layers", "5"), "5", "4 layers")


def test_a_plan_that_does_not_fit_is_refused_with_the_numbers(pair):
    assert fails(generate(pair, "--memory-gb", "0.001"), "1.00 MB")


def test_an_empty_or_long_prompt_is_refused_before_loading(pair, monkeypatch):
    monkeypatch.setattr("specdec.load.load", lambda *a, **k: pytest.fail("loaded"))
    long = "ab " * 5000
    assert fails(run("generate", *pair.options, "--raw", "-p", long), "4096", "context")
    assert fails(run("generate", *pair.options, "--raw", "-p", ""), "empty")


def test_an_unwritable_json_path_is_found_before_loading(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("specdec.load.load", lambda *a, **k: pytest.fail("loaded"))
    assert fails(generate(pair, "--json", tmp_path / "no" / "run.json"), "--json", "run.json")


def test_a_missing_tokenizer_is_named(copy):
    (copy.target / "tokenizer.json").unlink()
    assert fails(generate(copy), "tokenizer.json: not found")


def test_a_broken_tokenizer_is_named(copy):
    (copy.target / "tokenizer.json").write_text("{")
    assert fails(generate(copy), "tokenizer.json: not a readable tokenizer")


def test_a_template_that_leaves_its_sandbox_is_refused(copy):
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (copy.target / "chat_template.jinja").write_text(template)
    done = run("generate", *copy.options, "-p", "x")
    assert fails(done, "chat_template.jinja", "sandbox")


def test_a_truncated_checkpoint_is_named(copy):
    path = copy.target / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    assert fails(generate(copy), "model.safetensors")


def test_an_unknown_family_is_named(copy):
    (copy.target / "config.json").write_text('{"model_type": "llama"}')
    assert fails(generate(copy), "config.json", "llama")


def test_a_draft_of_another_width_is_named(copy):
    config = json.loads((copy.draft / "config.json").read_text())
    (copy.draft / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    assert fails(generate(copy), "hidden", "128", "64")


def test_a_missing_folder_is_named(pair):
    done = run("generate", "--model", "./nowhere", *PROMPT)
    assert done.exit_code == 2
    assert "error: ./nowhere: no such folder" in done.stderr


def test_a_disk_error_ends_the_run_and_keeps_the_old_json(pair, tmp_path, monkeypatch):
    """The tenth expert read after loading fails."""
    path = tmp_path / "run.json"
    path.write_text("old")
    reads, true = [0], checkpoint.read_at

    def failing(*arguments):
        reads[0] += 1
        if reads[0] > armed:
            raise OSError(5, "Input/output error")
        return true(*arguments)

    armed = 10**9
    monkeypatch.setattr(checkpoint, "read_at", failing)
    slots = ["--pin-layers", "1", "--cache-slots", "2", "--json", path]
    assert generate(pair, *slots).exit_code == 0
    path.write_text("old")
    armed, reads[0] = reads[0] - 10, 0
    done = generate(pair, *slots)
    assert done.exit_code == 2
    assert "error: " in done.stderr
    assert "Input/output error" in done.stderr
    assert "Traceback" not in done.stderr
    assert path.read_text() == "old"


# --- the other commands


def test_bench(pair, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"id": f"p{i}", "class": kind, "prompt": "the sea"} for i, kind in enumerate("aab")]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done, document = recorded(
        tmp_path,
        *("bench", *pair.options, "--prompts", prompts, "--budgets", "1,3", "--repeat", "2"),
        *("--max-tokens", "6", "--ignore-eos"),
    )
    assert document["tokens_equal"] is True
    assert len(document["runs"]) == 3 * 2 * 2
    assert set(document["classes"]) == {"a", "b", "all"}
    assert document["classes"]["all"]["3"]["speedup"] > 0
    assert re.search(r"^a \(2 prompts, 2 repeats, medians\)$", done.stdout, re.MULTILINE)
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


def test_inspect_names_what_is_broken(copy):
    (copy.target / "config.json").unlink()
    assert fails(run("inspect", copy.target), "config.json")


def test_doctor_tells_a_random_draft(pair):
    done = run("doctor", pair.target, pair.draft, "--positions", "20")
    assert done.exit_code == 1, done.stderr
    assert "slot 1:" in done.stdout
    assert "Too low: first-slot agreement" in done.stdout


def test_doctor_refuses_a_pair_that_cannot_be(copy):
    config = json.loads((copy.draft / "config.json").read_text())
    config["dflash_config"]["target_layer_ids"] = [0, 99]
    (copy.draft / "config.json").write_text(json.dumps(config))
    assert fails(run("doctor", copy.target, copy.draft), "99")


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
    assert "python (" in done.stdout
    assert "prose (" in done.stdout
    assert run("doctor", "--positions", "3", "-q").exit_code in (0, 1)


def test_an_installation_without_the_demo_pair_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("specdec.demo_pair.TARGET", tmp_path)
    assert fails(run("generate"), str(tmp_path), "demo pair", "--model")
