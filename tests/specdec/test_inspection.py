"""What `specdec inspect` tells of a checkpoint, against what was written."""

import math

import pytest

from specdec.checkpoint import Checkpoint
from specdec.inspection import NOT_READ, architecture, parameters, parts
from specdec.target.config import TargetConfig
from tests.checkpoints import FAMILIES, write_checkpoint


def look(folder):
    checkpoint = Checkpoint.open(folder)
    return checkpoint, TargetConfig.of(checkpoint)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize", [(4, 32), None])
def test_every_byte_belongs_to_a_part(tmp_path, family, quantize):
    write_checkpoint(tmp_path, family, quantize=quantize)
    checkpoint, config = look(tmp_path)
    found = {part.name: part for part in parts(checkpoint, config)}
    assert NOT_READ not in found
    assert sum(part.nbytes for part in found.values()) == sum(
        info.nbytes for info in checkpoint.tensors.values()
    )
    assert {"embedding", "attention", "experts", "gates", "norms", "head"} <= set(found)
    assert ("gated delta" in found) == (config.gdn is not None)
    experts = dict(found["experts"].packings)
    expected = "BF16" if quantize is None else "4 bits, group size 32"
    assert experts == {expected: 3 * config.num_layers}
    if quantize is not None:
        assert "8 bits, group size 64" in dict(found["gates"].packings)


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_does_not_change_the_number_of_parameters(tmp_path, family):
    write_checkpoint(tmp_path / "dense", family, quantize=None)
    write_checkpoint(tmp_path / "packed", family)
    dense, config = look(tmp_path / "dense")
    packed, _ = look(tmp_path / "packed")
    count = sum(math.prod(info.shape) for info in dense.tensors.values())
    assert parameters(dense, config) == parameters(packed, config) == count


def test_what_is_not_read_is_shown_apart(tmp_path):
    write_checkpoint(tmp_path, "qwen3_5_moe", extras=True)
    checkpoint, config = look(tmp_path)
    last = parts(checkpoint, config)[-1]
    assert (last.name, last.tensors) == (NOT_READ, 2)


def test_the_architecture_in_words(tmp_path):
    write_checkpoint(tmp_path, "qwen3_5_moe")
    words = dict(architecture(look(tmp_path)[1]))
    assert words["family"] == "qwen3_5_moe"
    assert words["layers"] == "4: 3 linear attention, 1 full attention"
    assert (
        words["experts"]
        == "8 in each of 4 layers, 2 per token, width 64, shared expert of width 64"
    )
    assert words["rotary"] == "8 of 32 dimensions, theta 10000"
    assert words["head"] == "of its own"
