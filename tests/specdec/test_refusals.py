"""Bad input at the command line: one line that names it, exit code 2, before anything is run."""

import json
import os
import shutil
import sys

import mlx.core as mx
import numpy as np
import pytest

from tests.commands import PROMPT, fails, generate, recorded, run
from tests.pairs import write_pair
from tests.targets import rewrite


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def copy(pair, tmp_path):
    """A copy of the pair, to be damaged."""
    for name, folder in pair._asdict().items():
        shutil.copytree(folder, tmp_path / name)
    return type(pair)(tmp_path / "target", tmp_path / "draft")


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
    assert fails(generate(pair, "--json", tmp_path / ("x" * 300)), "--json", "File name too long")


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


def test_inspect_names_what_is_broken(copy):
    (copy.target / "config.json").unlink()
    assert fails(run("inspect", copy.target), "config.json")


def test_doctor_refuses_a_pair_that_cannot_be(copy):
    config = json.loads((copy.draft / "config.json").read_text())
    config["dflash_config"]["target_layer_ids"] = [0, 99]
    (copy.draft / "config.json").write_text(json.dumps(config))
    assert fails(run("doctor", copy.target, copy.draft), "99")


# --- damage that unit tests know by other names


def test_nan_in_a_weight_is_named_with_its_layer(copy):
    def change(tensors):
        name = "language_model.model.layers.2.post_attention_layernorm.weight"
        values = np.array(tensors[name].astype(mx.float32))
        values[3] = np.nan
        tensors[name] = mx.array(values).astype(mx.bfloat16)

    rewrite(copy.target, change)
    assert fails(generate(copy), "NaN or Inf first appears in layer 2")


def test_an_index_that_names_an_absent_file_is_refused(copy):
    index = copy.target / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "model-00002.safetensors"}}))
    assert fails(generate(copy), index.name, "names model-00002.safetensors")


def change_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ({"mode": "mxfp4"}, ["mode 'mxfp4'", "expected 'affine'"]),
        ({"group_size": 48}, ["group_size 48", "(32, 64, 128)"]),
        ({"bits": 7}, ["bits 7"]),
        ({"bits": 8.0}, ["bits 8.0"]),
        ({"group_size": 64}, ["group size 32", "config.json says 4 bits, group size 64"]),
    ],
)
def test_packings_that_cannot_be_are_refused(copy, declared, words):
    def change(config):
        config["quantization"] |= declared
        del config["quantization_config"]

    change_config(copy.target, change)
    assert fails(generate(copy), *words)


def test_a_draft_of_another_vocabulary_or_with_other_taps_is_refused(copy):
    change_config(copy.draft, lambda config: config.update(vocab_size=400))
    assert fails(generate(copy), "vocabulary 400, the target has 320")
    change_config(
        copy.draft, lambda config: config["dflash_config"].update(target_layer_ids=[1, 7])
    )
    assert fails(generate(copy), "target_layer_ids [7] out of range", "vocabulary 400")


# --- what is not text


@pytest.mark.parametrize("option", ["--stop", "--system", "-p"])
def test_arguments_that_are_not_text_are_refused(pair, option):
    given = ["-p", "x", option, "a\udcff"] if option != "-p" else ["-p", "a\udcff"]
    done = run("generate", *pair.options, "--max-tokens", "2", *given)
    assert fails(done, "surrogates not allowed")


def test_a_bench_prompt_that_is_not_text_is_refused(pair, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"id": "a", "class": "b", "prompt": "a\udcff"}))
    assert fails(run("bench", *pair.options, "--prompts", path), "prompts.jsonl:1", "not text")


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are text")
def test_a_file_name_that_is_not_text_is_recorded(pair, tmp_path):
    path = tmp_path / "prompt\udcff"
    path.write_text("the rain")
    arguments = ["generate", *pair.options, "--raw", "--max-tokens", "2", "--prompt-file", path]
    _, document = recorded(tmp_path, *arguments)
    assert document["settings"]["prompt_file"] == str(path)
