"""`specdec bench` from end to end: cells, contexts, resuming after a kill, another engine."""

import json
import os
import re
import signal
import sys

import pytest

import specdec.generation
from specdec.tokenizer import Tokenizer
from tests.commands import fails, process, recorded, run
from tests.pairs import write_pair

LINES = [
    {"id": "c", "class": "code", "prompt": "def main():\n    "},
    {"id": "m", "class": "mathematics", "prompt": "The sum of 1 and 2 is"},
    {"id": "t", "class": "chat", "prompt": "Hello, who are you?"},
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.fixture
def requests(monkeypatch):
    """Every request that reaches the engine."""
    true, seen = specdec.generation.generate, []

    def spy(engine, tokenizer, request, *callbacks):
        seen.append(request)
        return true(engine, tokenizer, request, *callbacks)

    monkeypatch.setattr(specdec.generation, "generate", spy)
    return seen


def test_every_axis_reaches_the_engine(pair, prompts, requests, tmp_path):
    done, document = recorded(
        tmp_path,
        *("bench", *pair.options, "--prompts", prompts, "--classes", "chat,code", "--repeat", "1"),
        *("--temps", "0,0.8", "--contexts", "20,300", "--budgets", "1,3,auto", "--top-p", "0.9"),
        *("--max-budget", "4", "--seed", "7", "--max-tokens", "5", "--ignore-eos", "-q"),
    )
    warm_up, counted = requests[: 2 * 3], requests[2 * 3 :]
    assert len(counted) == 2 * 2 * 2 * 3
    assert [one.budget for one in counted] == [1, 3, "auto"] * 8
    assert [one.sampling.temperature for one in counted[::6]] == [0.0, 0.8] * 2
    assert [len(one.prompt_tokens) for one in counted[::3]] == [20, 300] * 4
    assert {one.sampling.seed for one in requests} == {7}
    assert {one.sampling.top_p for one in requests} == {0.9}
    assert {(one.max_tokens, one.max_budget) for one in requests} == {(5, 4)}
    assert {(one.sampling.temperature, one.budget) for one in warm_up} == {
        (temperature, budget) for temperature in (0.0, 0.8) for budget in (1, 3, "auto")
    }
    assert document["tokens_equal"] is True
    assert [one["class"] for one in document["prompts"]] == ["code", "code", "chat", "chat"]
    assert [one["tokens"] for one in document["prompts"]] == [20, 300] * 2
    assert document["settings"]["seed"] == 7
    assert {one["metrics"]["generated_tokens"] for one in document["runs"]} == {5}
    titles = re.findall(r"^(.*) \(\d prompts, 1 repeats\)$", done.stdout, re.MULTILINE)
    assert titles[0] == "code, temperature 0, context 20"
    assert titles[-1] == "all, temperature 0.8, context 300"
    assert len(titles) == 3 * 2 * 2
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_temperature_takes_another_text_and_a_seed_the_same(pair, prompts, tmp_path):
    def hashes(*options):
        _, document = recorded(
            tmp_path,
            *("bench", *pair.options, "--prompts", prompts, "--classes", "code", "--repeat", "1"),
            *("--budgets", "1,3", "--max-tokens", "12", "--ignore-eos", "-q", *options),
        )
        return {one["metrics"]["token_sha256"] for one in document["runs"]}

    cold, warm = hashes(), hashes("--temps", "0.9")
    assert len(cold) == len(warm) == 1
    assert cold != warm == hashes("--temps", "0.9", "--seed", "0")
    assert warm != hashes("--temps", "0.9", "--seed", "1")


def test_candidates_without_replacement_may_differ_over_budgets(pair, prompts, requests):
    arguments = ["--temps", "0,0.9", "--accept", "swor", "--repeat", "2", "--max-tokens", "12"]
    done = run("bench", *pair.options, "--prompts", prompts, "--budgets", "1,4", *arguments)
    assert done.exit_code == 0, done.stderr
    assert "budgets draw anew (--accept swor)" in done.stdout
    accepts = {(one.sampling.temperature, one.sampling.accept) for one in requests}
    assert accepts == {(0.0, "match"), (0.9, "swor")}


def test_chat_uses_the_template_unless_raw(pair, prompts, requests):
    arguments = ["--prompts", prompts, "--budgets", "1", "--repeat", "1", "--max-tokens", "1"]
    assert run("bench", *pair.options, *arguments).exit_code == 0
    assert run("bench", *pair.options, *arguments, "--raw").exit_code == 0
    tokenizer = Tokenizer.open(pair.target)
    shown = [tokenizer.backend.decode(list(one.prompt_tokens), False) for one in requests]
    assert len(shown) == 2 * 4  # the warm-up, then each prompt
    assert shown[3].startswith("<|im_start|>user\nHello, who are you?<|im_end|>")
    assert shown[7] == LINES[2]["prompt"]
    assert shown[1:3] == shown[5:7] == [LINES[0]["prompt"], LINES[1]["prompt"]]


def test_the_demo_pair_over_temperatures_and_contexts(prompts, tmp_path):
    done, document = recorded(
        tmp_path,
        *("bench", "--prompts", prompts, "--temps", "0,0.8", "--contexts", "24", "--budgets"),
        *("1,6,auto", "--repeat", "1", "--max-tokens", "16", "--ignore-eos", "-q"),
    )
    assert document["tokens_equal"] is True
    assert len(document["runs"]) == 3 * 2 * 3
    assert "tokens equal over all budgets and repeats, 3 prompts" in done.stdout
    accepted = {one["budget"]: one["metrics"]["accepted"] for one in document["runs"]}
    assert accepted[1] == 0 < accepted[6]


def test_the_prompts_that_ship(requests):
    """Four classes by default; the filter leaves the others out of the sweep."""
    arguments = ["--budgets", "1", "--repeat", "1", "--max-tokens", "1", "-q"]
    done = run("bench", *arguments, "--classes", "mathematics,chat")
    assert re.findall(r"^(\w+) \(\d+ prompts", done.stdout, re.M) == ["mathematics", "chat", "all"]
    assert len(requests) == 1 + 20


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--contexts", "4093"], ["--contexts 4093", "--max-tokens 4", "4097", "4096"]),
        (["--classes", "code,poems"], ["no prompt is of class 'poems'", "code, mathematics, chat"]),
        (["--resume", "--json", "{tmp}"], ["exists and is not a file"]),
    ],
)
def test_what_cannot_be_run_is_refused_before_loading(pair, prompts, tmp_path, options, words):
    options = [one.format(tmp=tmp_path) for one in options]
    arguments = ["--prompts", prompts, "--budgets", "1", "--max-tokens", "4", *options]
    done = run("bench", *pair.options, *arguments)
    assert fails(done, *words)
    assert "memory plan" not in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--resume"], "--resume needs --json"),
        (["--resume", "--json", "f", "--collect-routing", "g"], "exclude each other"),
        (["--resume", "--json", "f", "--save-warm", "g"], "--resume and --save-warm exclude"),
        (["--budgets", "1,some"], 'or "auto"'),
        (["--temps", "0,inf"], "inf is not a finite number"),
        (["--temps", "-1"], "-1.0 is not in the range x>=0"),
        (["--temps", "0.5,0.50"], "names a temperature twice"),
        (["--contexts", "0"], "0 is not in the range x>=1"),
        (["--contexts", "64,64"], "names a context length twice"),
        (["--classes", "a,a"], "names a class twice"),
        (["--against", "llama.cpp"], "'llama.cpp' is not 'mlx-lm'"),
        (["--against", "mlx-lm", "--budgets", "2,4"], "add 1 to --budgets"),
        (["--against", "mlx-lm", "--temps", "0.8"], "--against compares greedy decoding"),
        (["--against", "mlx-lm", "--cache-tolerance", "1"], "--against compares exact decoding"),
        (["--accept", "swor"], "--accept swor needs"),
    ],
)
def test_contradictions_are_refused(options, words):
    done = run("bench", *options)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_a_context_longer_than_all_prompts_says_that_they_repeat(pair, prompts):
    arguments = ["--prompts", prompts, "--budgets", "1", "--repeat", "1", "--max-tokens", "1", "-q"]
    long = run("bench", *pair.options, *arguments, "--contexts", "900")
    assert re.search(r"^note: all prompts together have \d+ tokens: a context of 900", long.stderr)
    assert run("bench", *pair.options, *arguments, "--contexts", "30").stderr == ""


# --- resuming


def sweep(pair, prompts, path):
    return [
        *("bench", *pair.options, "--prompts", prompts, "--budgets", "1,3", "--temps", "0,0.8"),
        *("--max-tokens", "8", "--ignore-eos", "--repeat", "4", "--json", path),
    ]


def test_a_killed_sweep_loses_at_most_the_run_under_way(pair, prompts, tmp_path):
    path = tmp_path / "sweep.json"
    arguments = sweep(pair, prompts, path)
    with process(*arguments, "--resume") as running:
        told = 0
        while told < 15:
            line = running.stderr.readline()
            assert line, "it ended early"
            told += line.startswith(b"repeat ")
        os.kill(running.pid, signal.SIGKILL)
        rest = running.stderr.read()
    assert running.returncode == -signal.SIGKILL
    told += rest.count(b"\nrepeat ") + rest.startswith(b"repeat ")
    before = json.loads(path.read_text())
    count = len(before["runs"])
    assert told <= count < 48
    assert (before["partial"], before["kept"]) == (True, 0)

    done = run(*arguments, "--resume")
    assert done.exit_code == 0, done.stderr
    assert f"kept from {path}: {count} of 48 runs\n" in done.stderr
    assert len(re.findall(r"^repeat ", done.stderr, re.MULTILINE)) == 48 - count
    after = json.loads(path.read_text())
    assert (after["partial"], after["kept"], after["tokens_equal"]) == (False, count, True)
    assert after["runs"][:count] == before["runs"]
    cells = [
        tuple(r[k] for k in ("prompt", "temperature", "budget", "repeat")) for r in after["runs"]
    ]
    assert len(set(cells)) == len(cells) == 48
    assert "tokens equal over all budgets and repeats, 3 prompts" in done.stdout

    again = run(*arguments, "--resume")  # nothing is left to do
    assert again.exit_code == 0, again.stderr
    assert "repeat 1/" not in again.stderr
    assert again.stdout == done.stdout
    assert json.loads(path.read_text())["runs"] == after["runs"]


def test_runs_of_other_conditions_are_refused(pair, prompts, tmp_path):
    path = tmp_path / "sweep.json"
    arguments = [*sweep(pair, prompts, path), "--classes", "code", "--repeat", "1", "--temps", "0"]
    assert run(*arguments).exit_code == 0
    whole = path.read_text()

    def refused(*words, more=()):
        text = path.read_text()
        done = run(*arguments, "--resume", *more)
        assert fails(done, str(path), *words)
        assert path.read_text() == text  # nothing is lost either

    refused("max_tokens 8, here 9", "cannot stand beside new ones", more=["--max-tokens", "9"])
    refused("seed 0, here 3", "tree", more=["--seed", "3", "--tree", "chain"])
    document = json.loads(whole)
    for change, words in (
        ({"schema": 1}, ["schema 1, expected"]),
        (
            {"kind": "generate", "prompt": "", "runs": {}},
            ["is of kind 'generate', expected 'bench'"],
        ),
        ({"specdec": "0.0.9"}, ['specdec "0.0.9", here ']),
        ({"environment": {**document["environment"], "cores": 99}}, ["cores 99, here "]),
        ({"runs": document["runs"] * 2}, ["stands there twice"]),
        ({"runs": [{**document["runs"][0], "repeat": 5}]}, ["repeat 5", "none of this sweep"]),
        ({"runs": [{}]}, ["not readable"]),
    ):
        path.write_text(json.dumps({**document, **change}))
        refused(*words)
    path.write_text("{")
    refused("not JSON")
    path.write_text(whole)
    prompts.write_text(prompts.read_text().replace("main", "other"))
    refused("tokens of prompts")


def test_a_model_that_was_written_again_is_another(pair, prompts, tmp_path):
    path = tmp_path / "sweep.json"
    arguments = [*sweep(pair, prompts, path), "--classes", "code", "--repeat", "1"]
    assert run(*arguments).exit_code == 0
    weights = next(pair.draft.glob("*.safetensors"))
    about = weights.stat()
    os.utime(weights, (about.st_atime, about.st_mtime + 1))
    assert fails(run(*arguments, "--resume"), "files of the draft")
    os.utime(weights, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert run(*arguments, "--resume").exit_code == 0


def test_without_a_file_resuming_begins_at_the_beginning(pair, prompts, tmp_path):
    path = tmp_path / "sweep.json"
    arguments = [*sweep(pair, prompts, path), "--classes", "code", "--repeat", "1", "--quiet"]
    done = run(*arguments, "--resume")
    assert done.exit_code == 0
    assert done.stderr == f"note: --resume: there is no {path} yet; every run is made\n"
    assert len(json.loads(path.read_text())["runs"]) == 4


# --- another engine


def against(pair, prompts, *options):
    arguments = ["--prompts", prompts, "--max-tokens", "6", "--repeat", "2", "--ignore-eos"]
    return ["bench", *pair.options, *arguments, "--against", "mlx-lm", *options]


def test_mlx_lm_does_the_same_beside_us(pair, prompts, tmp_path):
    pytest.importorskip("mlx_lm")
    done, document = recorded(tmp_path, *against(pair, prompts, "--budgets", "1,3"))
    assert re.search(r"^plain decoding against mlx-lm \S+, same checkpoint", done.stdout, re.M)
    assert re.search(r"^all .* 3 of 3$", done.stdout, re.MULTILINE)
    assert "note: mlx-lm holds the whole model in this process" in done.stderr
    order = re.findall(r"^repeat \d/2  (\w)  (budget \d|mlx-lm):", done.stderr, re.MULTILINE)
    who = ("budget 1", "mlx-lm", "budget 3")
    assert order == [(name, one) for _ in range(2) for name in "cmt" for one in who]
    peer = document["peer"]
    ours = {(run["prompt"], run["repeat"]): run for run in document["runs"] if run["budget"] == 1}
    assert len(peer["runs"]) == len(ours) == 6
    for one in peer["runs"]:
        run_of_ours = ours[one["prompt"], one["repeat"]]
        assert one["token_sha256"] == run_of_ours["metrics"]["token_sha256"]
        assert one["first_difference"] is one["gap"] is None
    last = peer["groups"][-1]
    assert (last["class"], last["prompts"], last["equal"]) == ("all", 3, 3)
    assert last["decode_tokens_per_second"]["ratio"] > 0
    path = tmp_path / "run.json"
    again = run(*against(pair, prompts, "--budgets", "1,3"), "--json", path, "--resume")
    assert again.stdout == done.stdout
    assert "repeat" not in again.stderr


def test_without_budgets_plain_decoding_alone_is_compared(pair, prompts, tmp_path):
    pytest.importorskip("mlx_lm")
    _, document = recorded(tmp_path, *against(pair, prompts, "--classes", "code", "-q"))
    assert document["budgets"] == [1]


def test_tokens_that_part_are_told_and_are_no_error(pair, prompts, tmp_path, monkeypatch):
    generate = pytest.importorskip("mlx_lm.generate")
    true = generate.generate_step

    def other(*arguments, **options):
        for at, (token, logprobs) in enumerate(true(*arguments, **options)):
            yield (token ^ 1 if at == 2 else token), logprobs

    monkeypatch.setattr(generate, "generate_step", other)
    done, document = recorded(tmp_path, *against(pair, prompts, "--classes", "chat"))
    assert re.search(r"^t: tokens part at 2, where mlx-lm prefers its own by ", done.stdout, re.M)
    assert re.search(r" 0 of 1$", done.stdout, re.MULTILINE)
    assert {one["first_difference"] for one in document["peer"]["runs"]} == {2}
    assert all(one["gap"] > 0 for one in document["peer"]["runs"])


def test_an_error_of_mlx_lm_is_told_in_a_line(pair, prompts, monkeypatch):
    generate = pytest.importorskip("mlx_lm.generate")

    def broken(*arguments, **options):
        raise ValueError("no kernel\nfor this")

    monkeypatch.setattr(generate, "generate_step", broken)
    done = run(*against(pair, prompts))
    assert done.exit_code == 2
    assert "failed on c: ValueError: no kernel for this\n" in done.stderr
    assert done.stdout.startswith("PARTIAL: ended after 1 of 6 runs\n")


def test_without_mlx_lm_it_says_what_to_install(pair, prompts, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlx_lm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    done = run(*against(pair, prompts))
    assert fails(done, "--against mlx-lm", "cannot be imported", "pip install 'specdec[peer]'")
    assert "memory plan" not in done.stderr


def test_a_checkpoint_that_mlx_lm_does_not_load(pair, prompts, tmp_path):
    pytest.importorskip("mlx_lm")
    repacked = tmp_path / "repacked"
    assert run("repack", pair.target, repacked).exit_code == 0
    done = run(*against(pair._replace(target=repacked), prompts))
    assert fails(done, "mlx-lm", "cannot load", str(repacked))
