"""Samples: the text of a run with every token's origin, and some of its rounds as drawn trees."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp

from specdec.reports.report import Report
from specdec.reports.series import Series
from specdec.round import Round
from specdec.round_drawing import ACCEPTED, BONUS, REJECTED, ROOT, quoted
from specdec.run_file import RecordedRun, RunFile
from specdec.vocabulary import Vocabulary, pieces, token_bytes

SAMPLES, TOKENS, TREES, LABEL = 4, 2000, 6, 22
"""At most: runs shown, tokens of a text, trees of a run, characters of a token in a tree."""

GAP, ROW, CHARACTER = 26, 26, 7.3
"""Pixels between columns of a tree, from row to row, and of a character."""


@dataclass(frozen=True)
class Mark:
    """One emitted token. role: "prefill", "accepted" or "bonus". words: its tooltip. first: whether
    a round begins with it."""

    text: str
    role: str
    words: str
    first: bool


@dataclass(frozen=True)
class Box:
    """One node of a drawn tree, in pixels; x, y of its left end and middle. link: an SVG path from
    the node above, "" for the root."""

    text: str
    role: str
    words: str
    x: float
    y: float
    width: float
    link: str


@dataclass(frozen=True)
class Drawing:
    """A round as a tree."""

    title: str
    boxes: tuple[Box, ...]
    width: float
    height: float


@dataclass(frozen=True)
class Sample:
    """A run that is shown. cut: how many tokens are not."""

    title: str
    prompt: str
    marks: tuple[Mark, ...]
    cut: int
    drawings: tuple[Drawing, ...]


def samples(report: Report) -> Iterator[Sample]:
    """The first speculative run of every file and class that drafted, at its fastest budget."""
    shown = 0
    for file in report.files:
        for run in _picked(report, file):
            if shown == SAMPLES:
                return
            shown += 1
            yield _sample(file, run, len(report.files) > 1)


def _picked(report: Report, file: RunFile) -> Iterator[RecordedRun]:
    runs = {id(run) for run in file.runs}
    series = [one for one in report.series if id(one.runs[0]) in runs and not one.plain]
    fastest = max(series, key=lambda one: _speed(report, one), default=None)
    if fastest is None:
        return
    for kind in dict.fromkeys(run.kind for run in fastest.runs):
        runs_of_kind = [run for run in fastest.runs if run.kind == kind and run.rounds]
        yield from runs_of_kind[:1]


def _speed(report: Report, one: Series) -> float:
    return next(f.speed.value or 0.0 for f in report.totals if f.series == one.name)


def _sample(file: RunFile, run: RecordedRun, several: bool) -> Sample:
    title = f"budget {run.budget}"
    if file.text is None:
        title = f"{run.title} ({run.kind}), {title}"
    if several:
        title = f"{file.name}: {title}"
    vocabulary = file.vocabulary
    marks = tuple(_marks(run, vocabulary))
    drawings = tuple(
        drawing(run.rounds[at], f"round {at + 1} of {len(run.rounds)}", vocabulary)
        for at in _telling(run.rounds)
    )
    cut = len(run.tokens) - len(marks)
    return Sample(title, file.text or "", marks, cut, drawings)


def _marks(run: RecordedRun, vocabulary: Vocabulary) -> Iterator[Mark]:
    origins: list[tuple[str, str, bool]] = [("prefill", "from the prompt's pass", False)]
    for at, one in enumerate(run.rounds, 1):
        for depth, row in enumerate(one.path[1:], 1):
            weight = exp(one.tree.log_weights[row])
            words = f"round {at}: accepted draft token at depth {depth}, path weight {weight:.3f}"
            origins.append((ACCEPTED, words, depth == 1))
        drafted = one.tree.rows - 1
        words = f"round {at}: bonus token after {one.accepted} of {drafted} accepted"
        origins.append((BONUS, words, one.accepted == 0))
    tokens = run.tokens[:TOKENS]
    for text, (role, words, first) in zip(pieces(vocabulary, tokens), origins, strict=False):
        yield Mark(text, role, words, first)


def _telling(rounds: tuple[Round, ...]) -> list[int]:
    """Rounds worth drawing, in order: those that accepted the most, one that accepted nothing, and
    one of each other number."""
    drafted = [at for at, one in enumerate(rounds) if one.tree.rows > 1]
    by_length: dict[int, int] = {}
    for at in drafted:
        by_length.setdefault(rounds[at].accepted, at)
    lengths = sorted(by_length, reverse=True)
    if len(lengths) > TREES:  # the ends, and some from between
        step = (len(lengths) - 1) / (TREES - 1)
        lengths = [lengths[round(step * at)] for at in range(TREES)]
    return sorted(by_length[length] for length in lengths)


def drawing(one: Round, name: str, vocabulary: Vocabulary) -> Drawing:
    """Depth goes to the right; the bonus token is drawn as one row more."""
    tree = one.tree
    parents = [*tree.parents.tolist(), one.path[-1]]
    depths = [*tree.depths.tolist(), len(one.path)]
    texts = [_label(vocabulary, token) for token in (*tree.tokens.tolist(), one.bonus)]
    widths = [CHARACTER * len(text) + 14 for text in texts]
    left, lanes = _columns(depths, widths), _lanes(one, parents)
    boxes = []
    for row, lane in lanes.items():
        x, y, link = left[depths[row]], lane * ROW + ROW / 2, ""
        if row:
            above = parents[row]
            x0, y0 = left[depths[above]] + widths[above], lanes[above] * ROW + ROW / 2
            link = f"M{x0:.0f} {y0:.0f}H{x - GAP / 2:.0f}V{y:.0f}H{x:.0f}"
        boxes.append(Box(texts[row], *_role(one, row), x, y, widths[row], link))
    title = f"{name}: {one.accepted} of {tree.rows - 1} accepted, {_milliseconds(one)}"
    height = (max(lanes.values()) + 1) * ROW
    return Drawing(title, tuple(boxes), left[-1] - GAP + 4, height)


def _columns(depths: Sequence[int], widths: Sequence[float]) -> list[float]:
    """Where the column of each depth begins, as wide as its widest node, and one more would."""
    left = [2.0]
    for depth in range(max(depths) + 1):
        wide = max(width for at, width in zip(depths, widths, strict=True) if at == depth)
        left.append(left[-1] + wide + GAP)
    return left


def _lanes(one: Round, parents: Sequence[int]) -> dict[int, int]:
    """Per row, from the root down, the lane it is drawn in. A node's first child stays in its lane:
    the bonus token, else the accepted child, else the likeliest."""
    bonus, accepted = one.tree.rows, set(one.path)
    children: list[list[int]] = [[] for _ in parents]
    for row, parent in enumerate(parents[1:], 1):
        children[parent].append(row)
    lanes: dict[int, int] = {}

    def place(row: int, lane: int) -> None:
        lanes[row] = lane
        below = sorted(children[row], key=lambda at: (at != bonus, at not in accepted))
        for at, child in enumerate(below):
            place(child, max(lanes.values()) + 1 if at else lane)

    place(0, 0)
    return lanes


def _role(one: Round, row: int) -> tuple[str, str]:
    """What a row is, and its tooltip."""
    if row == 0:
        return ROOT, "root: the last bonus token"
    if row == one.tree.rows:
        return BONUS, "bonus: the target's own next token"
    role = ACCEPTED if row in one.path else REJECTED
    return role, f"{role}, path weight {exp(one.tree.log_weights[row]):.3f}"


def _label(vocabulary: Vocabulary, token: int) -> str:
    text = quoted(token_bytes(vocabulary, token))[1:-1].replace(" ", "·")
    return text if len(text) <= LABEL else text[: LABEL - 1] + "…"


def _milliseconds(one: Round) -> str:
    return f"{1000 * sum(vars(one.seconds).values()):.1f} ms"
