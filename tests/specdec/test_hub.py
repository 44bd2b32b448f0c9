"""Where a model is looked for, and what is said when it is not there."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from specdec.errors import CheckpointError
from specdec.hub import FILES, resolve


class Hub:
    """Stands for snapshot_download: remembers its calls, answers as told."""

    def __init__(self, local, remote):
        self.answers = {True: local, False: remote}
        self.calls = []

    def __call__(self, repo_id, **options):
        self.calls.append((repo_id, options))
        answer = self.answers[options.get("local_files_only", False)]
        if isinstance(answer, Exception):
            raise answer
        return str(answer)


@pytest.fixture
def hub(monkeypatch):
    def install(local, remote):
        stand_in = Hub(local, remote)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
        return stand_in

    return install


NOT_CACHED = errors.LocalEntryNotFoundError("Cannot find the snapshot\nmore")


def snapshot(folder, shards=("model.safetensors",), index=None):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for shard in shards:
        (folder / shard).write_bytes(b"")
    if index is not None:
        weight_map = {f"t{i}": name for i, name in enumerate(index)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_folder_is_taken_as_it_is(tmp_path, hub):
    calls = hub(NOT_CACHED, NOT_CACHED).calls
    assert resolve(str(tmp_path)) == tmp_path
    assert calls == []


@pytest.mark.parametrize(
    "model",
    [
        "./no/such",
        "/no/such",
        "~/no-such-folder",
        "no-such",
        "no/such/folder",
        "../x",
        "x/",
        "",
        "~nobody-here/x",
        "x" * 300,  # no name of a file can be so long
    ],
)
def test_a_missing_path_never_reaches_the_network(tmp_path, monkeypatch, hub, model):
    monkeypatch.chdir(tmp_path)
    calls = hub(NOT_CACHED, NOT_CACHED).calls
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve(model)
    assert calls == []


def test_a_mistyped_path_in_an_existing_folder_is_a_path(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    calls = hub(NOT_CACHED, NOT_CACHED).calls
    with pytest.raises(CheckpointError, match="models/tpyo: no such folder"):
        resolve("models/tpyo")
    assert calls == []


def test_a_file_is_not_a_model(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file; expected the folder"):
        resolve(str(file))


@pytest.mark.parametrize("index", [None, ["a.safetensors", "b.safetensors"]])
def test_a_complete_cache_is_used_without_the_network(tmp_path, hub, index):
    folder = snapshot(tmp_path / "s", ["a.safetensors", "b.safetensors"], index)
    stand_in = hub(folder, NOT_CACHED)
    assert resolve("owner/name") == folder
    (call,) = stand_in.calls
    assert call == ("owner/name", {"allow_patterns": list(FILES), "local_files_only": True})


def test_an_interrupted_download_is_resumed(tmp_path, hub):
    folder = snapshot(tmp_path / "s", ["a.safetensors"], ["a.safetensors", "b.safetensors"])
    stand_in = hub(folder, folder)
    assert resolve("owner/name") == folder
    assert len(stand_in.calls) == 2
    assert stand_in.calls[1][1]["allow_patterns"] == list(FILES)


def response(kind):
    return kind("refused", response=SimpleNamespace(headers={}, request=None, status_code=0))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda: response(errors.RepositoryNotFoundError), "no such repository"),
        (lambda: response(errors.GatedRepoError), "accept its terms"),
        (lambda: response(errors.HfHubHTTPError), "download failed: HfHubHTTPError: refused"),
        (lambda: NOT_CACHED, "cannot be reached \\(Cannot find the snapshot\\)"),
        (lambda: OSError(28, "No space left on device"), "download failed: OSError: .*No space"),
    ],
)
def test_every_way_to_fail_has_its_words(hub, answer, words):
    hub(NOT_CACHED, answer())
    with pytest.raises(CheckpointError, match=f"^owner/name: .*{words}"):
        resolve("owner/name")


def test_offline_for_real(tmp_path):
    """The library itself, told to stay offline with an empty cache."""
    code = "from specdec.hub import resolve; resolve('owner/name')"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert "CheckpointError: owner/name: not in the local cache" in done.stderr
