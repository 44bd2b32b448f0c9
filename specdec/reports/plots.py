"""Plots of a report: SVG by matplotlib, whose colours are the page's CSS variables.

The library draws in stand-in colours; each is then replaced by a variable, so that a plot follows
the page into the dark. Text stays text. Needs matplotlib: pip install "specdec[report]".
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from specdec.errors import SpecdecError
from specdec.intervals import Estimate
from specdec.reports.figures import Figures
from specdec.reports.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = 8
"""Series colours of the page; more series use them again."""

INK, FAINT = "#00000a", "#00000b"
SERIES = tuple(f"#0000c{at}" for at in range(COLOURS))
VARIABLES = {INK: "--ink", FAINT: "--line"} | {
    colour: f"--s{at}" for at, colour in enumerate(SERIES)
}

PHASE_COLOURS = {"draft": 2, "build": 4, "verify": 1, "commit": 3, "other": 0}

LABEL = 34
"""Characters of a name beside an axis."""


@dataclass(frozen=True)
class Plot:
    """An SVG. legend: (colour number, name) of what is in it. table: the one of its figures."""

    title: str
    words: str
    svg: str
    legend: tuple[tuple[int, str], ...]
    table: str


def plots(report: Report) -> Iterator[Plot]:
    """Every plot that has something to show. SpecdecError without matplotlib."""
    drawn = [one for one in report.totals if one.rounds]
    colour = _colours(report)
    trees = [one for one in drawn if one.depths]
    pen = _Pen(colour)
    if drawn:
        yield pen.plot("speed", "Decode speed", "tokens per second, 95 % intervals", drawn, _speed)
    if report.comparisons:
        yield pen.ratios(report)
    numbered = [one for one in drawn if isinstance(one.budget, int)]
    if len(numbered) > 1:
        yield pen.plot(
            "speed",
            "Throughput against budget",
            "decode tokens per second; a band is a budget that the clock chooses",
            drawn,
            _throughput({one.name: one.work for one in report.series}),
        )
    if drawn:
        words = "verify milliseconds by rows, medians and quartiles"
        yield pen.plot("costs", "Cost of a verify pass", words, drawn, _costs)
    if trees:
        words = "rounds that accepted at least so many draft tokens"
        yield pen.plot("depths", "Acceptance by depth", words, trees, _depths)
        words = "tokens committed per round, the bonus token among them"
        yield pen.plot("lengths", "Accepted lengths", words, trees, _lengths)
        words = "children of accepted nodes, by the draft's ranking"
        yield pen.plot("ranks", "Acceptance by sibling rank", words, trees, _ranks)
        words = "what the draft predicted of a path, and how often it was accepted"
        yield pen.plot("calibration", "Calibration", words, trees, _calibration)
    if any(len(one.chosen) > 1 for one in trees):
        words = "rounds by the nodes that they verified"
        yield pen.plot("chosen", "Nodes per round", words, trees, _chosen)
    if drawn:
        words = "milliseconds per round"
        plot = pen.plot("phases", "Where a round's time goes", words, drawn, _phases)
        yield replace(plot, legend=tuple((at, name) for name, at in PHASE_COLOURS.items()))
    if any(not layer.pinned for one in drawn for layer in one.layers):
        words = "requested experts that were in memory; hollow: pinned layers"
        yield pen.plot("layers", "Hit rate by layer", words, drawn, _layers)


def _colours(report: Report) -> dict[str, int]:
    """A colour per series; the first plain one's is 0, a grey."""
    plain = next((one.name for one in report.series if one.plain), None)
    others = [one.name for one in report.series if one.name != plain]
    found = {name: 1 + at % (COLOURS - 1) for at, name in enumerate(others)}
    return found if plain is None else {plain: 0, **found}


Draw = Callable[["Axes", Sequence[Figures], Sequence[str]], None]


class _Pen:
    """Draws plots in the colours of the report's series."""

    def __init__(self, colour: dict[str, int]) -> None:
        self._colour, self._count = colour, 0

    def plot(
        self, table: str, title: str, words: str, shown: Sequence[Figures], draw: Draw
    ) -> Plot:
        numbers = [self._colour[one.series] for one in shown]
        colours = [SERIES[number] for number in numbers]
        names = [one.series for one in shown]
        rows = len(shown) if draw in (_speed, _phases) else 0
        svg = self._svg(lambda axes: draw(axes, shown, colours), rows)
        return Plot(title, words, svg, tuple(zip(numbers, names, strict=True)), table)

    def ratios(self, report: Report) -> Plot:
        """Speed-ups with their intervals, a row for each."""
        shown = [one for one in report.comparisons if one.speed.value is not None]
        kinds = len({one.kind for one in shown}) > 1

        def draw(axes: "Axes") -> None:
            labels = []
            for at, one in enumerate(shown):
                _point(axes, one.speed, at, SERIES[self._colour[one.series]])
                labels.append(f"{one.series} ({one.kind})" if kinds else one.series)
            _rows(axes, labels)
            axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.set_xlabel("times as fast")

        series = dict.fromkeys((self._colour[one.series], one.series) for one in shown)
        words = "against the run it is compared with, 95 % intervals; dashed: as fast"
        return Plot("Speed-up", words, self._svg(draw, len(shown)), tuple(series), "comparisons")

    def _svg(self, draw: Callable[["Axes"], None], rows: int = 0) -> str:
        try:
            import matplotlib as mpl
            from matplotlib.figure import Figure
        except ImportError as error:
            raise SpecdecError(
                "--format html draws with matplotlib, which is not installed: "
                'pip install "specdec[report]", or ask for --format text, md or json'
            ) from error
        style: Any = {
            "svg.fonttype": "none",
            "svg.hashsalt": "specdec",
            "text.parse_math": False,
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.linewidth": 0.6,
            "axes.edgecolor": FAINT,
            "grid.color": FAINT,
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "xtick.color": FAINT,
            "ytick.color": FAINT,
        }
        self._count += 1
        with mpl.rc_context(style):
            height = 2.9 if not rows else max(1.6, 0.75 + 0.27 * rows)
            figure = Figure(figsize=(4.9, height), layout="constrained")
            draw(figure.subplots())
            file = io.StringIO()
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        return _inline(file.getvalue(), f"p{self._count}-")


def _inline(svg: str, prefix: str) -> str:
    """An SVG file as a part of a page: ids of its own, colours and fonts of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?) ?width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) ?height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"\b(id=\"|xlink:href=\"#|url\(#)", rf"\1{prefix}", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()


def _rows(axes: "Axes", names: Sequence[str]) -> None:
    """A row per name, the first on top."""
    short = [name if len(name) <= LABEL else name[: LABEL - 1] + "…" for name in names]
    axes.set_yticks(range(len(names)), short)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def _point(axes: "Axes", of: Estimate, row: float, colour: str) -> None:
    if of.value is not None:
        if of.low is not None and of.high is not None:
            axes.plot([of.low, of.high], [row, row], color=colour, linewidth=2.5, alpha=0.55)
        axes.plot([of.value], [row], "o", color=colour, markersize=6)


def _bars(
    of: Sequence[tuple[float, Estimate]],
) -> tuple[list[float], list[float], list[list[float]]]:
    """x, y and the distances to the interval's ends, of estimates that have a value."""
    known = [(x, one, one.value) for x, one in of if one.value is not None]
    ends = [
        (value - one.low, one.high - value)
        if one.low is not None and one.high is not None
        else (0.0, 0.0)
        for _, one, value in known
    ]
    wide = [[max(end[side], 0.0) for end in ends] for side in (0, 1)]
    return [x for x, _, _ in known], [value for _, _, value in known], wide


def _curve(axes: "Axes", of: Sequence[tuple[float, Estimate]], colour: str, line: str) -> None:
    x, y, wide = _bars(of)
    if x:
        axes.errorbar(
            x, y, wide, fmt=line, color=colour, markersize=4, linewidth=1.6, elinewidth=1.2
        )


def _speed(axes: "Axes", shown: Sequence[Figures], colours: Sequence[str]) -> None:
    for at, one in enumerate(shown):
        _point(axes, one.speed, at, colours[at])
    _rows(axes, [one.series for one in shown])
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens per second")


def _throughput(work: dict[str, str]) -> Draw:
    """work: per series what it ran; those that ran the same are joined by a line."""

    def draw(axes: "Axes", shown: Sequence[Figures], colours: Sequence[str]) -> None:
        joined: dict[str, list[tuple[int, float]]] = {}
        for one, colour in zip(shown, colours, strict=True):
            if one.speed.value is None:
                continue
            if isinstance(one.budget, int):
                _curve(axes, [(one.budget, one.speed)], colour, "o")
                joined.setdefault(work[one.series], []).append((one.budget, one.speed.value))
                continue
            axes.axhline(one.speed.value, color=colour, linestyle=(0, (5, 2)))
            if one.speed.low is not None and one.speed.high is not None:
                axes.axhspan(one.speed.low, one.speed.high, color=colour, alpha=0.12, lw=0)
        for line in joined.values():
            axes.plot(*zip(*sorted(line), strict=True), color=INK, lw=1, alpha=0.5, zorder=1)
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("budget (1: autoregressive)")
        axes.set_ylabel("tokens per second")

    return draw


def _costs(axes: "Axes", shown: Sequence[Figures], colours: Sequence[str]) -> None:
    for one, colour in zip(shown, colours, strict=True):
        of = [(at.rows, Estimate(at.median, at.low, at.high)) for at in one.costs]
        _curve(axes, of, colour, "o-")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("rows verified")
    axes.set_ylabel("ms")


def _depths(axes: "Axes", shown: Sequence[Figures], colours: Sequence[str]) -> None:
    for at, (one, colour) in enumerate(zip(shown, colours, strict=True)):
        aside = 0.06 * (at - (len(shown) - 1) / 2)
        _curve(axes, [(d.depth + aside, d.reached) for d in one.depths], colour, "o-")
    _shares(axes)
    axes.set_xlabel("draft tokens accepted, at least")


def _ranks(axes: "Axes", shown: Sequence[Figures], colours: Sequence[str]) -> None:
    for at, (one, colour) in enumerate(zip(shown, colours, strict=True)):
        aside = 0.06 * (at - (len(shown) - 1) / 2)
        _curve(axes, [(r.rank + aside, r.rate) for r in one.ranks], colour, "o")
    _shares(axes)
    axes.set_xlabel("rank among siblings (0: likeliest)")


def _lengths(axes: "Axes", shown: Sequence[Figures], colours: Sequence[str]) -> None:
    _histogram(axes, [[(b.length, b.share) for b in one.lengths] for one in shown], colours)
    axes.set_xlabel("tokens committed by a round")


def _chosen(axes: "Axes", shown: Sequence[Figures], colours: Sequence[str]) -> None:
    _histogram(axes, [[(b.nodes, b.share) for b in one.chosen] for one in shown], colours)
    axes.set_xlabel("nodes verified by a round (0: plain decoding)")


def _histogram(
    axes: "Axes", of: Sequence[Sequence[tuple[int, float]]], colours: Sequence[str]
) -> None:
    width = 0.84 / len(of)
    for at, bars in enumerate(of):
        aside = width * (at - (len(of) - 1) / 2)
        axes.bar([x + aside for x, _ in bars], [y for _, y in bars], width, color=colours[at])
    axes.grid(axis="x", visible=False)
    axes.locator_params(axis="x", integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def _shares(axes: "Axes") -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.locator_params(axis="x", integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def _calibration(axes: "Axes", shown: Sequence[Figures], colours: Sequence[str]) -> None:
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
    for one, colour in zip(shown, colours, strict=True):
        _curve(axes, [(b.predicted, b.accepted) for b in one.calibration.bins], colour, "o")
    _shares(axes)
    axes.locator_params(axis="x", integer=False)
    axes.set_xlim(-0.03, 1.03)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlabel("predicted")
    axes.set_ylabel("accepted")


def _phases(axes: "Axes", shown: Sequence[Figures], _: Sequence[str]) -> None:
    for at, one in enumerate(shown):
        left = 0.0
        for phase in one.phases:
            colour = SERIES[PHASE_COLOURS[phase.name]]
            axes.barh(at, phase.ms_per_round, 0.62, left, color=colour)
            left += phase.ms_per_round
    _rows(axes, [one.series for one in shown])
    axes.set_xlabel("milliseconds per round")


def _layers(axes: "Axes", shown: Sequence[Figures], colours: Sequence[str]) -> None:
    for one, colour in zip(shown, colours, strict=True):
        known = [(at.layer, at.hit_rate, at.pinned) for at in one.layers if at.hit_rate is not None]
        axes.plot([x for x, _, _ in known], [y for _, y, _ in known], color=colour, linewidth=1.4)
        for pinned in (False, True):
            part = [(x, y) for x, y, kept in known if kept == pinned]
            if part:
                fill = "none" if pinned else colour
                axes.plot(*zip(*part, strict=True), "o", color=colour, mfc=fill, markersize=4)
    _shares(axes)
    axes.set_xlabel("layer")
