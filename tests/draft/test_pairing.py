"""Draft and target that do not belong together are told apart by their configs."""

from dataclasses import dataclass, replace

import pytest

from specdec.draft.config import DraftConfig
from specdec.draft.pairing import check_pairing
from specdec.errors import PairingError
from tests.drafts import draft_config


@dataclass(frozen=True)
class TargetSizes:
    hidden_size: int = 64
    num_layers: int = 12
    vocab_size: int = 500


@pytest.fixture
def draft() -> DraftConfig:
    target = {
        "hidden_size": 64,
        "num_hidden_layers": 12,
        "vocab_size": 500,
        "max_position_embeddings": 4096,
    }
    return DraftConfig.from_dict(draft_config(target))


def test_a_pair(draft):
    check_pairing(draft, TargetSizes())
    check_pairing(replace(draft, num_target_layers=None), TargetSizes())


@pytest.mark.parametrize(
    ("target", "changes", "words"),
    [
        (TargetSizes(hidden_size=32), {}, "hidden size 64, the target has 32"),
        (TargetSizes(vocab_size=501), {}, "vocabulary 500, the target has 501"),
        (TargetSizes(num_layers=11), {}, "12 layers, the target has 11"),
        (TargetSizes(), {"target_layer_ids": (1, 12)}, r"\[12\] out of range, .* 0 to 11"),
        (TargetSizes(), {"target_layer_ids": (5, 1)}, r"\[5, 1\], expected rising"),
        (TargetSizes(), {"target_layer_ids": (1, 1)}, "without repetition"),
        (TargetSizes(vocab_size=499), {}, "mask_token_id 499, the target's ids end at 498"),
    ],
)
def test_mismatches_are_named(draft, target, changes, words):
    with pytest.raises(PairingError, match=words):
        check_pairing(replace(draft, **changes), target)


def test_all_mismatches_are_named_at_once(draft):
    with pytest.raises(PairingError) as caught:
        check_pairing(draft, TargetSizes(32, 4, 100))
    for words in ("hidden size", "vocabulary", "layers", "out of range", "mask_token_id"):
        assert words in str(caught.value)
