"""Repacking: right bytes in the right places, resumed or refused, never half used."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec import checkpoint as checkpoint_module
from specdec import durable
from specdec.checkpoint import Checkpoint
from specdec.errors import CheckpointError, ExpertReadError, RepackError
from specdec.repack import repack
from specdec.repack_check import verify
from specdec.target.config import TargetConfig
from specdec.target.expert_store import ExpertStore
from specdec.target.repacked_index import ALIGNMENT, INDEX, JOURNAL, RepackedIndex, is_repacked
from tests.checkpoints import write_checkpoint
from tests.commands import fails, run
from tests.pairs import write_pair

MIXED = {"layers.1.mlp.switch_mlp.down_proj": (8, 32), "layers.2.mlp.switch_mlp.up_proj": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return write_checkpoint(folder, "qwen3_5_moe", mixed=MIXED, shards=3, extras=True)


def packed(model, out, places=None):
    with Checkpoint.open(model) as checkpoint:
        store = ExpertStore(checkpoint, TargetConfig.of(checkpoint))
        return repack(checkpoint, store, out, places, "by hand" if places else "identity")


def tensors(folder):
    truth: dict[str, mx.array] = {}
    for file in folder.glob("*.safetensors"):
        truth |= mx.load(str(file))  # type: ignore[arg-type]
    return truth


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def raw(array):
    kind = {2: mx.uint16, 4: mx.uint32}[array.dtype.size]
    return np.array(array.view(kind)).tobytes()


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99))
def test_every_slice_lies_where_the_index_says(model, tmp_path_factory, seed):
    out = tmp_path_factory.mktemp("out")
    random = np.random.default_rng(seed)
    places = {layer: random.permutation(8).tolist() for layer in range(4)}
    done = packed(model, out, places if seed else None)
    truth = tensors(model)
    prefix = next(n for n in truth if n.endswith("layers.0.mlp.gate.weight")).split("layers.0.")[0]
    for layer in done.index.layers:
        assert layer.places == tuple(places[layer.layer] if seed else range(8))
        assert layer.stride % ALIGNMENT == 0
        data = (out / layer.file).read_bytes()
        assert len(data) == 8 * layer.stride
        for one in layer.slices:
            name = f"{prefix}layers.{layer.layer}.mlp.switch_mlp.{one.projection}.{one.tensor}"
            for expert, place in enumerate(layer.places):
                at = place * layer.stride + one.offset
                assert data[at : at + one.nbytes] == raw(truth[name][expert])
    others = {name for name in truth if ".switch_mlp." not in name}
    dense = tensors(out)
    assert set(dense) == others
    assert all(raw(dense[name]) == raw(truth[name]) for name in others)


def test_gate_and_up_are_read_in_one_piece(model, tmp_path):
    for layer in packed(model, tmp_path / "out").index.layers:
        both = [s for s in layer.slices if s.projection != "down_proj"]
        down = [s for s in layer.slices if s.projection == "down_proj"]
        start = min(s.offset for s in both)
        assert max(s.offset + s.nbytes for s in both) - start == sum(s.nbytes for s in both)
        assert min(s.offset for s in down) == sum(s.nbytes for s in both)


def test_everything_beside_the_experts_comes_along(tmp_path):
    pair = write_pair(tmp_path)
    (pair.target / "NOTES.md").write_text("notes")
    packed(pair.target, tmp_path / "out")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "NOTES.md"):
        assert (tmp_path / "out" / name).read_bytes() == (pair.target / name).read_bytes()
    index, hashed = verify(tmp_path / "out", hashes=True)
    assert hashed == sum(entry.size for entry in index.files.values())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {INDEX, *index.files}


class Disk:
    """A disk that fails at its n-th write or read."""

    def __init__(self, patch, module, name, fail_at, code):
        self.calls, self.fail_at, self.code = 0, fail_at, code
        self.real = getattr(module, name)
        patch.setattr(module, name, self)

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls == self.fail_at:
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*arguments)


@settings(max_examples=12, deadline=None)
@given(fail_at=st.integers(1, 50), code=st.sampled_from([errno.ENOSPC, errno.EIO]))
def test_a_full_disk_at_any_write_is_said_and_resumed(model, tmp_path_factory, fail_at, code):
    out = tmp_path_factory.mktemp("out") / "out"
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, durable, "write_some", fail_at, code)
        with suppress(RepackError):
            packed(model, out)
            assert disk.calls < fail_at
    assert not list(out.glob(".*"))
    if disk.calls >= fail_at:
        assert not (out / INDEX).exists()
        if (out / JOURNAL).exists():
            with pytest.raises(RepackError, match="unfinished"):
                is_repacked(out)
    packed(model, out)
    assert is_repacked(out)
    verify(out, hashes=True)


@pytest.mark.parametrize("fail_at", [1, 7, 60, 300])
def test_a_source_that_cannot_be_read(model, tmp_path, fail_at, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, checkpoint_module, "read_at", fail_at, errno.EIO)
        with pytest.raises(ExpertReadError, match="Input/output error"):
            packed(model, tmp_path / "out")
    assert not (tmp_path / "out" / INDEX).exists()
    packed(model, tmp_path / "out")
    verify(tmp_path / "out", hashes=True)


def test_a_source_truncated_meanwhile_is_a_short_read(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "model", "qwen3_moe")
    real, calls = checkpoint_module.read_at, 0

    def truncating(*arguments):
        nonlocal calls
        calls += 1
        if calls == 100:
            os.truncate(folder / "model.safetensors", 100_000)
        return real(*arguments)

    monkeypatch.setattr(checkpoint_module, "read_at", truncating)
    with pytest.raises(ExpertReadError, match="short read"):
        packed(folder, tmp_path / "out")
    assert not (tmp_path / "out" / INDEX).exists()


def test_a_full_disk_on_the_command_line(model, tmp_path, monkeypatch):
    Disk(monkeypatch, durable, "write_some", 30, errno.ENOSPC)
    done = run("repack", model, tmp_path / "out")
    assert fails(done, str(tmp_path / "out"), "No space left on device")


def interrupted(model, out, layers=2):
    """A repack that was cut off after some layers."""
    written = 0
    real = durable.DurableFile.keep

    def keep(self):
        nonlocal written
        written += self.path.suffix == ".bin"
        if written > layers:
            raise KeyboardInterrupt
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(durable.DurableFile, "keep", keep)
        with pytest.raises(KeyboardInterrupt):
            packed(model, out)


def test_a_resumed_repack_keeps_what_is_good_and_equals_an_undisturbed_one(model, tmp_path):
    interrupted(model, tmp_path / "out")
    done = packed(model, tmp_path / "out")
    assert [name for name in done.kept if name.endswith(".bin")] == [
        "experts-00000.bin",
        "experts-00001.bin",
    ]
    packed(model, tmp_path / "other")
    assert content(tmp_path / "out") == content(tmp_path / "other")
    assert packed(model, tmp_path / "out").written == 0


def test_a_finished_file_that_was_damaged_is_written_again(model, tmp_path):
    out = tmp_path / "out"
    interrupted(model, out)
    with (out / "experts-00000.bin").open("r+b") as file:
        file.seek(5)
        file.write(b"\xff\xee")
    os.truncate(out / "experts-00001.bin", 100)
    done = packed(model, out)
    assert not [name for name in done.kept if name.endswith(".bin")]
    verify(out, hashes=True)


def test_another_model_or_other_places_are_refused(model, tmp_path):
    out = tmp_path / "out"
    interrupted(model, out)
    other = write_checkpoint(tmp_path / "other", "qwen3_moe", seed=1)
    places = {layer: range(7, -1, -1) for layer in range(4)}
    before = content(out)
    for arguments in ((other, out), (model, out, places)):
        with pytest.raises(RepackError, match="unfinished repack of another model"):
            packed(*arguments)
    assert content(out) == before
    packed(model, out)
    with pytest.raises(RepackError, match="whole repack of another model"):
        packed(other, out)


def test_folders_that_are_something_else_are_refused(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RepackError, match="is not empty"):
        packed(model, tmp_path)
    with pytest.raises(RepackError, match="the model itself"):
        packed(model, model)
    with pytest.raises(RepackError, match="cannot be made"):
        packed(model, tmp_path / "thesis.tex" / "out")


def test_too_little_room_is_refused_before_anything_is_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and Free())
    with pytest.raises(RepackError, match=r"are to be written, 10 B are free"):
        packed(model, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [JOURNAL]


class Free:
    free = 10


def test_two_processes_do_not_repack_into_one_folder(model, tmp_path):
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(RepackError, match="another process"):
        packed(model, out)
    os.close(descriptor)
    packed(model, out)


def test_a_killed_process_leaves_nothing_that_is_believed(tmp_path):
    """SIGKILL in the middle of a layer file; the next run clears up and finishes."""
    pair = write_pair(tmp_path)
    out = tmp_path / "out"
    code = f"""
import os, signal, sys
from specdec import durable
real, calls = durable.write_some, 0
def dying(descriptor, data):
    global calls
    calls += 1
    if calls == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(descriptor, data)
durable.write_some = dying
from specdec.cli import main
main(["repack", {str(pair.target)!r}, {str(out)!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(out.glob(".*.part"))
    assert fails(run("generate", "-m", out, "-p", "a", "--raw"), "unfinished repack", str(out))
    assert run("repack", pair.target, out).exit_code == 0
    assert not list(out.glob(".*"))
    verify(out, hashes=True)


# --- the index


@pytest.fixture(scope="module")
def good(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("good") / "out"
    packed(model, out)
    return out


def broken(good, tmp_path, change):
    """The folder with a changed index, its files linked."""
    out = tmp_path / "broken"
    out.mkdir()
    for path in good.iterdir():
        if path.name != INDEX:
            os.link(path, out / path.name)
    document = json.loads((good / INDEX).read_text())
    change(document)
    (out / INDEX).write_text(json.dumps(document))
    return out


CHANGES = {
    "schema 2": lambda d: d.update(schema=2),
    "no permutation": lambda d: d["layers"][0].update(places=[0] * 8),
    "overlap": lambda d: d["layers"][1]["tensors"][2].update(offset=0),
    "leave their record": lambda d: d["layers"][1]["tensors"][8].update(offset=10**9),
    "multiple of 16384": lambda d: (
        d["layers"][0].update(stride=d["layers"][0]["stride"] * 2, places=[0, 1, 2, 3])
        or d["layers"][0].update(stride=d["layers"][0]["stride"] // 4, places=list(range(16)))
    ),
    "records of": lambda d: d["layers"][0].update(stride=16384 * 99),
    "plain file name": lambda d: d["files"].update({"../x": {"size": 1, "sha256": ""}}),
    "is missing": lambda d: d["files"].update({"x.bin": {"size": 1, "sha256": ""}}),
    "expected 1 as": lambda d: d["files"]["model.safetensors"].update(size=1),
    "broken": lambda d: d["layers"][0].update(places=["a"]),
    "quantization 7": lambda d: d["layers"][0]["quantization"][0].update(bits=7),
    "dtype 'Q4'": lambda d: d["layers"][0]["tensors"][0].update(dtype="Q4"),
}


@pytest.mark.parametrize("words", CHANGES)
def test_an_index_that_lies_is_refused(good, tmp_path, words):
    out = broken(good, tmp_path, CHANGES[words])
    with pytest.raises(CheckpointError, match=words):
        RepackedIndex.read(out)


def test_an_edited_config_loads_and_is_told_by_the_check(good, tmp_path):
    out = broken(good, tmp_path, lambda d: d["files"]["config.json"].update(size=1))
    RepackedIndex.read(out)
    with pytest.raises(RepackError, match=r"config\.json: \d+ bytes, expected 1"):
        verify(out, hashes=False)
    (out / "config.json").unlink()
    with pytest.raises(RepackError, match=r"config\.json: is missing"):
        verify(out, hashes=False)


def test_a_flipped_bit_is_found_by_its_hash(good, tmp_path):
    out = broken(good, tmp_path, lambda d: None)
    path = out / "experts-00002.bin"
    data = bytearray(path.read_bytes())
    path.unlink()  # the link, not the original
    data[12345] ^= 1
    path.write_bytes(data)
    verify(out, hashes=False)
    with pytest.raises(RepackError, match=hashlib.sha256(data).hexdigest()):
        verify(out, hashes=True)


# --- inspect


def test_inspect_shows_and_verifies_a_repacked_folder(tmp_path):
    pair = write_pair(tmp_path)
    out = tmp_path / "out"
    assert run("repack", pair.target, out).exit_code == 0
    plain, repacked = run("inspect", pair.target), run("inspect", out)
    assert repacked.exit_code == 0, repacked.stderr
    assert "repacked      from target, order of experts: identity" in repacked.stdout
    assert "their sizes are right" in repacked.stdout

    def line(done, word):
        return next(one.split() for one in done.stdout.splitlines() if one.startswith(word))

    assert line(plain, "parameters") == line(repacked, "parameters")
    assert line(plain, "experts  ")[4:] == line(repacked, "experts  ")[4:]  # padding aside
    done = run("inspect", out, "--verify")
    assert "as their hashes say" in done.stdout
    data = bytearray((out / "experts-00001.bin").read_bytes())
    data[7] ^= 1
    (out / "experts-00001.bin").write_bytes(data)
    assert run("inspect", out).exit_code == 0
    assert fails(run("inspect", out, "--verify"), "experts-00001.bin", "damaged")
    assert fails(run("inspect", pair.target, "--verify"), "no repacked folder")
