"""The draft's doctor: does this draft predict this target, and if not, why not?

A draft that is wired wrongly (rope without YaRN, taps one layer off, another mask token) raises no
error: acceptance drops to nothing and the output stays right. So the doctor measures. It lets the
target read a text once, drafts after each of the last positions from the target's states, and
counts how often the draft's first choice is the target's own next token. Where that is low it
changes one suspect at a time and measures again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import mlx.core as mx
import numpy as np

from specdec.draft.config import DraftConfig
from specdec.draft.diagnosis import Agreement, Diagnosis, Trial
from specdec.draft.model import Draft
from specdec.draft.pairing import PairedTarget, check_pairing
from specdec.errors import PromptError
from specdec.kernels.array import Array, concatenate, is_numpy

# Mask tokens of drafts published so far: what a config may have been copied from.
PUBLISHED_MASK_IDS = (151669, 248070, 248077)
CHUNK = 64  # tokens per pass of the target: logits of all of them are held at once


class TeacherOutput(Protocol):
    """logits [rows, vocab] and taps [rows, taps * hidden]."""

    @property
    def logits(self) -> Array: ...
    @property
    def taps(self) -> Array: ...


class Teacher(Protocol):
    """What the doctor needs of a target."""

    taps: tuple[int, ...]

    @property
    def config(self) -> PairedTarget: ...

    def reset(self) -> None: ...

    def prefill(self, tokens: Sequence[int], *, all_logits: bool) -> TeacherOutput:
        """Commit tokens after those committed; logits and taps of every one of them."""
        ...


def examine(
    target: Teacher,
    draft: Draft,
    tokens: Sequence[int],
    positions: int = 200,
    thorough: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> Diagnosis:
    """Measure a pair on a text, and look for the cause where it is below diagnosis.MINIMUM.

    tokens: the text, `TEXT` encoded for instance; the last `positions` of them are measured.
    thorough: look for something better even if the pair fits.
    on_progress: told what is being measured.
    Leaves target and draft without tokens. PairingError if the configs already do not match,
    PromptError for a text of less than two tokens.
    """
    check_pairing(draft.config, target.config)
    if len(tokens) < 2:
        raise PromptError(f"the text to examine has {len(tokens)} tokens, expected 2 or more")
    tell = on_progress or (lambda words: None)
    tell("the target reads the text")
    lesson = _Lesson(target, draft.config, tokens, positions)
    tell("the draft as configured")
    slots = lesson.measure(draft, draft.config.target_layer_ids, draft.config.slots)
    found = Diagnosis(len(tokens), slots)
    if found.fits and not thorough:
        return found
    trials = []
    for change, meaning, variant, ids in _variants(draft, target.config.num_layers):
        tell(change)
        trials.append(Trial(change, meaning, lesson.measure(variant, ids, 1)[0]))
    return replace(found, trials=tuple(trials))


class _Lesson:
    """One reading of the text by the target: its choices and its states at every token."""

    def __init__(
        self, target: Teacher, config: DraftConfig, tokens: Sequence[int], positions: int
    ) -> None:
        self.tokens = [int(token) for token in tokens]
        self.first = max(1, len(tokens) - positions)
        self.hidden = config.hidden_size
        ids, layers = config.target_layer_ids, target.config.num_layers
        # The neighbours as well: a tap that is one layer off is a classic.
        near = {i + step for i in ids for step in (-1, 0, 1)}
        self.layers = sorted(i for i in near if 0 <= i < layers)
        configured, target.taps = target.taps, tuple(self.layers)
        chosen, taps = [], []
        try:
            target.reset()
            for start in range(0, len(tokens), CHUNK):
                output = target.prefill(self.tokens[start : start + CHUNK], all_logits=True)
                best = (np if is_numpy(output.logits) else mx).argmax(output.logits, axis=-1)
                chosen.append(np.array(best))
                taps.append(output.taps)
        finally:
            target.taps = configured
            target.reset()
        self.chosen = np.concatenate(chosen)
        self.taps = concatenate(taps)

    def measure(self, draft: Draft, ids: Sequence[int], slots: int) -> tuple[Agreement, ...]:
        """Agreement of the first `slots` slots, the draft fed with the taps of layers `ids`."""
        columns = [self.layers.index(i) for i in ids]
        rows = self.taps.reshape(len(self.tokens), len(self.layers), self.hidden)
        rows = rows[:, draft.backend.index(columns)].reshape(len(self.tokens), -1)
        hits, seen = [0] * slots, [0] * slots
        draft.reset()
        draft.extend(rows[: self.first])
        for position in range(self.first, len(self.tokens)):
            top = draft.propose(self.tokens[position], 1).tokens[:, 0]
            for slot in range(min(slots, len(self.tokens) - position)):
                at = position + slot
                if slot and self.tokens[at] != self.chosen[at - 1]:
                    break  # from here on the text is not what the target would have said
                seen[slot] += 1
                hits[slot] += int(top[slot] == self.chosen[at])
            draft.extend(rows[position : position + 1])
        draft.reset()
        return tuple(Agreement(*counts) for counts in zip(hits, seen, strict=True))


def _variants(draft: Draft, layers: int) -> Iterator[tuple[str, str, Draft, tuple[int, ...]]]:
    """The suspects: (change, what is wrong if it helps, changed draft, layers tapped)."""
    config, ids = draft.config, draft.config.target_layer_ids

    def changed(shift: int = 0, **fields: object) -> Draft:
        changed_config = replace(config, **fields)  # type: ignore[arg-type]
        return Draft(
            changed_config, draft.weights, draft.embedding, draft.head, draft.backend, shift
        )

    rope = config.rope
    if rope.rope_type == "default":
        yarn = replace(rope, rope_type="yarn", factor=64.0, original_max_position=4096)
        yield (
            "rope with YaRN (factor 64 of 4096)",
            "the draft was trained with YaRN, but its config.json has no rope_scaling",
            changed(rope=yarn),
            ids,
        )
    else:
        yield (
            f"rope without {rope.rope_type}",
            f"the draft was trained with plain rope, but its config.json asks for {rope.rope_type}",
            changed(rope=replace(rope, rope_type="default")),
            ids,
        )
    if rope.rope_type == "yarn":
        yield (
            "YaRN without its attention factor",
            "the draft was trained without YaRN's attention factor: "
            "its config.json needs attention_factor 1.0",
            changed(rope=replace(rope, attention_factor=1.0)),
            ids,
        )
    for step, words in ((1, "above"), (-1, "below")):
        moved = tuple(i + step for i in ids)
        if all(0 <= i < layers for i in moved):
            yield (
                f"taps one layer {words} ({', '.join(map(str, moved))})",
                f"target_layer_ids count differently: they should be {list(moved)}",
                draft,
                moved,
            )
    for mask in PUBLISHED_MASK_IDS:
        if mask != config.mask_token_id and mask < config.vocab_size:
            yield (
                f"mask token {mask}",
                f"mask_token_id {config.mask_token_id} is wrong, it should be {mask}",
                changed(mask_token_id=mask),
                ids,
            )
    sliding = tuple(window > 0 for window in config.windows)
    flips = sliding if any(sliding) else (True,) * config.num_layers
    causal = tuple(old != flip for old, flip in zip(config.causal, flips, strict=True))
    kind = "sliding" if any(sliding) else "all"
    yield (
        f"{kind} layers {'causal' if causal[flips.index(True)] else 'bidirectional'} in the block",
        f"is_causal should be {str(causal[flips.index(True)]).lower()} (for {kind} layers)",
        changed(causal=causal),
        ids,
    )
    for shift in (1, -1):
        yield (
            f"block positions {shift:+d}",
            "the draft was trained with block positions one off against its context",
            changed(shift),
            ids,
        )


# A text that targets of all kinds read well: plain code with plain words.
TEXT = '''"""Read a table of numbers and print a summary of every column."""

import csv
import math
from pathlib import Path


class Column:
    """The values of one column, in the order of the file."""

    def __init__(self, name):
        self.name = name
        self.values = []

    def add(self, value):
        self.values.append(value)

    def mean(self):
        """Return the mean, or zero when there are no values."""
        if not self.values:
            return 0.0
        return sum(self.values) / len(self.values)

    def deviation(self):
        """Return the standard deviation, or zero when there are no values."""
        if not self.values:
            return 0.0
        mean = self.mean()
        total = sum((value - mean) ** 2 for value in self.values)
        return math.sqrt(total / len(self.values))


def read_columns(path):
    """Read a file and return a list of columns.

    The first line of the file has the names of the columns. Every other line
    has one number for each of them.
    """
    with Path(path).open(newline="") as file:
        reader = csv.reader(file)
        columns = [Column(name) for name in next(reader)]
        for row in reader:
            for column, text in zip(columns, row):
                column.add(float(text))
    return columns


def main(path):
    for column in read_columns(path):
        print(column.name, column.mean(), column.deviation())


if __name__ == "__main__":
    import sys

    if len(sys.argv) != 2:
        print("usage: summary.py FILE")
        sys.exit(1)
    main(sys.argv[1])
'''
