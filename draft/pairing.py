"""Do a draft and a target belong together? Checked on their configs alone, before any weight.

A wrong pair runs without an error and accepts next to nothing, so everything that can be compared
is compared. What cannot be seen in a config, `specdec doctor` measures.
"""

from typing import Protocol

from specdec.draft.config import DraftConfig
from specdec.errors import PairingError


class PairedTarget(Protocol):
    """The part of a target's config that a draft depends on."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


def check_pairing(draft: DraftConfig, target: PairedTarget) -> None:
    """PairingError naming every mismatch, what was found and what was expected."""
    wrong = []
    for what, found, expected in (
        ("hidden size", draft.hidden_size, target.hidden_size),
        ("vocabulary", draft.vocab_size, target.vocab_size),
    ):
        if found != expected:
            wrong.append(f"{what} {found}, the target has {expected}")
    layers = target.num_layers
    if draft.num_target_layers not in (None, layers):
        wrong.append(
            f"trained for a target of {draft.num_target_layers} layers, the target has {layers}"
        )
    ids = list(draft.target_layer_ids)
    outside = [i for i in ids if not 0 <= i < layers]
    if outside:
        wrong.append(f"target_layer_ids {outside} out of range, the target has 0 to {layers - 1}")
    if ids != sorted(set(ids)):
        wrong.append(f"target_layer_ids {ids}, expected rising layer numbers without repetition")
    if not 0 <= draft.mask_token_id < target.vocab_size:
        wrong.append(
            f"mask_token_id {draft.mask_token_id}, the target's ids end at {target.vocab_size - 1}"
        )
    if wrong:
        raise PairingError("draft and target do not belong together: " + "; ".join(wrong))
