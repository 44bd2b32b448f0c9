"""Values of the wrong kind in a model folder's JSON files: refused by name, never a traceback."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from specdec.cli import main
from specdec.commands.session import door
from specdec.errors import SpecdecError
from specdec.load import Settings, plan_for
from tests.checkpoints import FAMILIES
from tests.pairs import Pair, write_pair

WRONG: tuple[Any, ...] = (["x"], "x", None, -1, {"x": []}, 1e300, True)
GENERATION = {"eos_token_id": [319, 317], "bos_token_id": 317, "do_sample": True, "top_k": 20}
FILES = (
    "target/config.json",
    "target/generation_config.json",
    "target/tokenizer_config.json",
    "draft/config.json",
)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    pair = write_pair(tmp_path_factory.mktemp("door"), request.param)
    (pair.target / "generation_config.json").write_text(json.dumps(GENERATION))
    settings = json.loads((pair.target / "tokenizer_config.json").read_text())
    settings["eos_token"] = {"content": "<|im_end|>", "special": True}
    template = settings["chat_template"]
    settings["chat_template"] = [{"name": "default", "template": template}]
    (pair.target / "tokenizer_config.json").write_text(json.dumps(settings))
    return pair


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value below; of long lists, the first."""
    if isinstance(value, dict):
        children = list(value.items())
    else:
        children = list(enumerate(value[:1])) if isinstance(value, list) else []
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def replaced(document: Any, path: tuple, value: Any) -> Any:
    changed = copy.deepcopy(document)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


def enter(pair: Pair) -> None:
    """All that is read of a pair before its weights are."""
    options = {"model": str(pair.target), "draft": str(pair.draft), "prefill_chunk": 256}
    options |= dict.fromkeys(("pin_layers", "cache_slots", "memory_gb"))
    options |= {"io": "buffered", "queue_depth": 8, "policy": "lru", "protect": (6, 3)}
    options |= {"prefetch": "auto", "prefetch_mb": None}
    tokenizer, _ = door(options)
    assert all(type(token) is int for token in tokenizer.eos_ids)
    if tokenizer.has_template:
        tokenizer.apply_template([{"role": "user", "content": "x"}])
    plan_for(Settings(str(pair.target), str(pair.draft), context=64))


def refusal(pair: Pair) -> Exception | None:
    """What a pair is refused with."""
    try:
        enter(pair)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("file", FILES)
def test_any_value_of_another_kind_works_or_is_refused(
    pair: Pair, file: str, tmp_path: Path
) -> None:
    copied = Pair(tmp_path / "target", tmp_path / "draft")
    for here, there in zip(pair, copied, strict=True):
        shutil.copytree(here, there)
    enter(copied)
    path = tmp_path / file
    document = json.loads(path.read_text())
    refused = 0
    for place in places(document):
        for value in WRONG:
            path.write_text(json.dumps(replaced(document, place, value)))
            error = refusal(copied)
            assert error is None or isinstance(error, SpecdecError), (place, value, error)
            assert error is None or str(error).strip()
            refused += error is not None
    assert refused > 0


@pytest.mark.parametrize("value", [[], "x", None, -1])
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_no_object_is_refused_at_the_command_line(
    pair: Pair, file: str, value: Any, tmp_path: Path
) -> None:
    copied = Pair(tmp_path / "target", tmp_path / "draft")
    for here, there in zip(pair, copied, strict=True):
        shutil.copytree(here, there)
    (tmp_path / file).write_text(json.dumps(value))
    done = CliRunner().invoke(main, ["generate", *copied.options, "-p", "x", "--max-tokens", "1"])
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert Path(file).name in done.stderr
