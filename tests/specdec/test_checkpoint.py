"""Checkpoints: headers, indexes, packings, reads, and what is refused.

What is read is compared with MLX's own reader on the same files.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specdec import checkpoint as checkpoint_module
from specdec.checkpoint import Checkpoint
from specdec.errors import CheckpointError, ExpertReadError
from specdec.quantization import Quantization
from tests.checkpoints import FAMILIES, write_checkpoint

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "gates": (8, 32),
}
GATE = "model.layers.0.mlp.gate"
UP = "model.layers.0.mlp.switch_mlp.up_proj"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, "qwen3_moe", **SMALL)


def edit_config(folder: Path, edit: Callable[[dict], object]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    edit(config)
    file.write_text(json.dumps(config))


def edit_quantization(folder: Path, **entries: Any) -> None:
    def edit(config: dict) -> None:
        del config["quantization_config"]
        config["quantization"] |= entries

    edit_config(folder, edit)


def rewrite(folder: Path, **tensors: mx.array | None) -> None:
    """Replace tensors of the one safetensors file (names with __ for dots); None removes."""
    file = str(folder / "model.safetensors")
    held: dict[str, mx.array] = mx.load(file)  # type: ignore[assignment]
    mx.eval(list(held.values()))
    for name, array in tensors.items():
        held.pop(name.replace("__", "."), None)
        if array is not None:
            held[name.replace("__", ".")] = array
    mx.save_safetensors(file, held)


def dotted(path: str) -> str:
    return path.replace(".", "__")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tensors_are_what_mlx_reads(tmp_path: Path, family: str, shards: int, dtype: str) -> None:
    folder = write_checkpoint(tmp_path, family, shards=shards, dtype=dtype, extras=True)
    truth: dict[str, mx.array] = {}
    for file in folder.glob("*.safetensors"):
        truth |= mx.load(str(file))  # type: ignore[arg-type]
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.config == json.loads((folder / "config.json").read_text())
        assert checkpoint.tensors.keys() == truth.keys()
        for name, array in truth.items():
            info = checkpoint.info(name, tuple(array.shape))
            assert info.nbytes == array.nbytes
            read = checkpoint.load(name)
            assert read.dtype == array.dtype
            assert mx.array_equal(read, array)
            wide = checkpoint.load(name, tuple(array.shape), mx.float32)
            if array.dtype == mx.uint32:
                assert wide.dtype == mx.uint32
            else:
                assert mx.array_equal(wide, array.astype(mx.float32))


def test_every_shard_counts_when_there_is_no_index(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "qwen3_moe", shards=2, **SMALL)
    with Checkpoint.open(folder) as checkpoint:
        names = checkpoint.tensors.keys()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "._model.safetensors").write_bytes(b"not a checkpoint")
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.tensors.keys() == names


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("declare", [True, False])
def test_packing_follows_from_shapes(
    tmp_path: Path, bits: int, group_size: int, declare: bool
) -> None:
    folder = write_checkpoint(
        tmp_path,
        "qwen3_moe",
        quantize=(bits, group_size),
        declare=declare,
        hidden_size=128,
        num_hidden_layers=1,
    )
    with Checkpoint.open(folder) as checkpoint:
        found = Quantization(bits, group_size)
        assert checkpoint.quantization("model.layers.0.self_attn.q_proj", 128) == found
        assert checkpoint.quantization(UP, 128) == found
        assert checkpoint.quantization(GATE, 128) == Quantization(8, 64)
        # 64 inputs: a group of 128 does not divide them, so the module stayed dense.
        expected = None if group_size == 128 else found
        assert checkpoint.quantization("model.layers.0.mlp.switch_mlp.down_proj", 64) == expected


def test_a_dense_checkpoint_has_no_packing(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "qwen3_moe", quantize=None, **SMALL)
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.quantization(UP, 32) is None


def test_modules_may_differ(tmp_path: Path) -> None:
    mixed: dict[str, tuple[int, int] | None] = {
        "layers.0.linear_attn.in_proj_a": (8, 32),
        "layers.0.linear_attn.in_proj_b": (3, 32),
        "layers.1.linear_attn.in_proj_b": None,
    }
    folder = write_checkpoint(tmp_path, "qwen3_5_moe", mixed=mixed, **SMALL)
    with Checkpoint.open(folder) as checkpoint:
        at = "language_model.model.layers.{}.linear_attn.in_proj_{}"
        assert checkpoint.quantization(at.format(0, "a"), 32) == Quantization(8, 32)
        assert checkpoint.quantization(at.format(0, "b"), 32) == Quantization(3, 32)
        assert checkpoint.quantization(at.format(1, "a"), 32) == Quantization(4, 32)
        assert checkpoint.quantization(at.format(1, "b"), 32) is None


def test_config_paths_may_lack_the_wrapper_of_the_tensors(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "qwen3_5_moe", **SMALL)
    wrapped = f"language_model.{GATE}"

    def strip(config: dict) -> None:
        del config["quantization_config"]
        config["quantization"][GATE] = {"bits": 6, "group_size": 32}
        del config["quantization"][wrapped]

    edit_config(folder, strip)
    with (
        Checkpoint.open(folder) as checkpoint,
        pytest.raises(CheckpointError, match=r"8 bits.*config\.json says 6 bits"),
    ):
        checkpoint.quantization(wrapped, 32)


def test_gates_at_other_bits_need_no_entry_in_the_config(small: Path) -> None:
    edit_quantization(small, **{GATE: None})
    edit_config(small, lambda config: config["quantization"].pop(GATE))
    with Checkpoint.open(small) as checkpoint:
        assert checkpoint.quantization(GATE, 32) == Quantization(8, 32)


@pytest.mark.parametrize(
    ("entries", "path", "text"),
    [
        ({"bits": 8}, UP, "packed with 4 bits, group size 32 .* says 8 bits, group size 32"),
        ({GATE: {"bits": 4}}, GATE, "packed with 8 bits, .* says 4 bits, group size 32"),
        ({UP: False}, UP, "packed with 4 bits, group size 32, but config.json says dense"),
        ({UP: {"mode": "mxfp4"}}, UP, "up_proj has mode 'mxfp4', expected 'affine'"),
        ({UP: 4}, UP, "quantization of .*up_proj is 4"),
    ],
)
def test_a_config_that_contradicts_the_shapes_is_refused(
    small: Path, entries: dict, path: str, text: str
) -> None:
    edit_quantization(small, **entries)
    with Checkpoint.open(small) as checkpoint, pytest.raises(CheckpointError, match=text):
        checkpoint.quantization(path, 32)


@pytest.mark.parametrize(
    ("declared", "text"),
    [
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "quantization has mode 'mxfp4'"),
        ({"bits": 7, "group_size": 32}, r"bits 7 .* expected bits in \(2, 3, 4, 5, 6, 8\)"),
        ({"bits": 4, "group_size": 48}, "group_size 48, expected"),
        ({"bits": 4}, "bits 4 and group_size None"),
        ({"quant_method": "fp8"}, "quant_method 'fp8'"),
        ("4bit", "quantization is '4bit', expected an object"),
    ],
)
def test_unknown_quantization_is_refused_at_the_door(small: Path, declared: Any, text: str) -> None:
    edit_config(small, lambda config: config.update(quantization=declared))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{text}"):
        Checkpoint.open(small)


def test_quantization_is_also_found_inside_text_config(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "qwen3_5_moe", **SMALL)

    def nest(config: dict) -> None:
        del config["quantization_config"]
        config["text_config"]["quantization_config"] = {**config.pop("quantization"), "bits": 8}

    edit_config(folder, nest)
    with Checkpoint.open(folder) as checkpoint, pytest.raises(CheckpointError, match="8 bits"):
        checkpoint.quantization(f"language_model.{UP}", 32)


@pytest.mark.parametrize(
    ("tensors", "in_features", "text"),
    [
        ({f"{UP}.scales": None}, 32, r"up_proj\.weight is U32 but .*scales is missing"),
        ({f"{UP}.biases": None}, 32, r"up_proj\.biases is missing"),
        ({f"{UP}.biases": mx.zeros((8, 32, 2))}, 32, r"biases has shape \[8, 32, 2\], expected"),
        ({f"{UP}.biases": mx.zeros((8, 32, 1))}, 32, "biases is F32, its scales BF16"),
        ({f"{UP}.scales": mx.zeros((8, 32, 1), mx.uint8)}, 32, "scales is U8, .* only affine"),
        ({f"{UP}.weight": mx.zeros((8, 32, 4))}, 32, "weight is F32 beside scales, expected U32"),
        ({f"{UP}.weight": mx.zeros((4, 32, 4), mx.uint32)}, 32, "all but the last must agree"),
        ({f"{UP}.weight": mx.zeros((8, 32, 7), mx.uint32)}, 32, "which is 7 bits; expected one of"),
        ({f"{UP}.weight": mx.zeros((8, 32, 2), mx.uint32)}, 32, "2 bits, .* says 4 bits"),
        ({}, 48, "4 packed columns for 48 inputs, which is 2.66667 bits"),
        ({}, 64, "1 groups for 64 inputs|2 bits"),
    ],
)
def test_shapes_and_dtypes_that_make_no_packing_are_refused(
    small: Path, tensors: dict, in_features: int, text: str
) -> None:
    rewrite(small, **{dotted(name): array for name, array in tensors.items()})
    with Checkpoint.open(small) as checkpoint, pytest.raises(CheckpointError, match=text):
        checkpoint.quantization(UP, in_features)


def test_a_group_size_that_does_not_divide_is_refused(small: Path) -> None:
    # 96 inputs at 4 bits in 2 groups of 48
    packed, scales = mx.zeros((8, 32, 12), mx.uint32), mx.zeros((8, 32, 2), mx.bfloat16)
    rewrite(small, **{dotted(f"{UP}.weight"): packed, dotted(f"{UP}.scales"): scales})
    rewrite(small, **{dotted(f"{UP}.biases"): scales})
    with (
        Checkpoint.open(small) as checkpoint,
        pytest.raises(CheckpointError, match="2 groups for 96 inputs; expected a group size"),
    ):
        checkpoint.quantization(UP, 96)


def test_missing_and_misshapen_tensors_are_named(small: Path) -> None:
    with Checkpoint.open(small) as checkpoint:
        with pytest.raises(CheckpointError, match=r"tensor model\.nothing is missing"):
            checkpoint.load("model.nothing")
        with pytest.raises(
            CheckpointError, match=r"norm\.weight has shape \[32\], expected \[33\]"
        ):
            checkpoint.load("model.norm.weight", (33,))
    rewrite(small, model__norm__weight=mx.zeros((32,), mx.int32))
    with (
        Checkpoint.open(small) as checkpoint,
        pytest.raises(CheckpointError, match=r"norm\.weight is I32, expected one of BF16"),
    ):
        checkpoint.load("model.norm.weight")


def test_a_folder_needs_config_and_tensors(tmp_path: Path, small: Path) -> None:
    with pytest.raises(CheckpointError, match="absent: not a folder"):
        Checkpoint.open(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        Checkpoint.open(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"empty: no \*\.safetensors file"):
        Checkpoint.open(tmp_path / "empty")
    for text, error in (("{", "not valid JSON"), ("[]", "holds a list"), ("[" * 9**6, "JSON")):
        (small / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"config\.json: .*{error}"):
            Checkpoint.open(small)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model.norm.weight": "absent.safetensors"}, "names absent.safetensors, which is not in"),
        ({"model.nothing": "model-00001-of-00002.safetensors"}, "tensor model.nothing is not in"),
        ({"model.norm.weight": "../x.safetensors"}, "expected a plain file name"),
        ({"model.norm.weight": 7}, "lies in 7, expected a plain file name"),
    ],
)
def test_an_index_that_names_what_is_absent_is_refused(
    tmp_path: Path, change: dict, text: str
) -> None:
    folder = write_checkpoint(tmp_path, "qwen3_moe", shards=2, **SMALL)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= change
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"index\.json: .*{text}"):
        Checkpoint.open(folder)
    index.write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="weight_map is missing or empty"):
        Checkpoint.open(folder)


def test_the_index_decides_between_two_files_with_one_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "qwen3_moe", shards=2, **SMALL)
    mx.save_safetensors(str(folder / "other.safetensors"), {"model.norm.weight": mx.zeros((32,))})
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.info("model.norm.weight").file.name != "other.safetensors"
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is also in"):
        Checkpoint.open(folder)


@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_truncated_file_is_refused(small: Path, data: st.DataObject) -> None:
    file = small / "model.safetensors"
    content = file.read_bytes()
    length = data.draw(st.one_of(st.integers(0, 64), st.integers(0, len(content) - 1)))
    try:
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: .*truncated"):
            Checkpoint.open(small)
    finally:
        file.write_bytes(content)


@given(data=st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_header_never_ends_in_a_traceback(small: Path, data: st.DataObject) -> None:
    file = small / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    try:
        file.write_bytes(damaged)
        try:
            with Checkpoint.open(small) as checkpoint:
                size = len(content)
                assert all(i.offset + i.nbytes <= size for i in checkpoint.tensors.values())
        except CheckpointError as error:
            assert "model.safetensors" in str(error)  # noqa: PT017 - not every damage is an error
    finally:
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}, "unknown dtype F4"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "takes 8 bytes, but its offsets"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}, "header is broken"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0]}, "header is broken"),
        ({"dtype": "F32", "shape": [1]}, "header is broken"),
        ({"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}, "truncated: tensor x ends at"),
    ],
)
def test_headers_that_lie_are_refused(small: Path, entry: dict, text: str) -> None:
    header = json.dumps({"x": entry}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    (small / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        Checkpoint.open(small)


def test_reads_come_from_the_given_bytes_and_short_ones_are_errors(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoint.open(small) as checkpoint:
        info = checkpoint.info("model.norm.weight")
        buffer = np.zeros(10, np.uint8)
        checkpoint.pread_into(info, 4, buffer.data)
        assert buffer.tobytes() == info.file.read_bytes()[info.offset + 4 : info.offset + 14]
        whole = checkpoint.load(info.name)
        real = checkpoint_module.read_at
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_module, "read_at", lambda fd, b, at: real(fd, b[:3], at))
            assert mx.array_equal(checkpoint.load(info.name), whole)
        with monkeypatch.context() as patch:  # no read is larger than a system allows
            patch.setattr(checkpoint_module, "READ_BYTES", 7)
            sizes: list[int] = []

            def recorded(descriptor: int, buffer: memoryview, offset: int) -> int:
                sizes.append(len(buffer))
                return real(descriptor, buffer, offset)

            patch.setattr(checkpoint_module, "read_at", recorded)
            assert mx.array_equal(checkpoint.load(info.name), whole)
            assert sizes == [7] * 9 + [1]
        os.truncate(info.file, info.offset + 5)
        with pytest.raises(ExpertReadError, match=r"short read .* 1 of 10 bytes"):
            checkpoint.pread_into(info, 4, buffer.data)
        with pytest.raises(CheckpointError, match=r"short read .* 5 of 64 bytes"):
            checkpoint.load(info.name)


def test_files_are_closed(small: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    checkpoint = Checkpoint.open(small)
    assert len(os.listdir("/dev/fd")) == before + 1
    checkpoint.close()
    checkpoint.close()
    assert len(os.listdir("/dev/fd")) == before
    os.truncate(small / "model.safetensors", 1000)
    with pytest.raises(CheckpointError):
        Checkpoint.open(small)
    assert len(os.listdir("/dev/fd")) == before
