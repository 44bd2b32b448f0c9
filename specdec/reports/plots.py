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
from specdec.reports import curves
from specdec.reports.figures import Figures
from specdec.reports.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VARIABLES = {curves.INK: "--ink", curves.FAINT: "--line"} | {
    colour: f"--s{at}" for at, colour in enumerate(curves.SERIES)
}


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
        yield pen.plot(
            "speed", "Decode speed", "tokens per second, 95 % intervals", drawn, curves.speed
        )
    if report.comparisons:
        yield pen.ratios(report)
    numbered = [one for one in drawn if isinstance(one.budget, int)]
    if len(numbered) > 1:
        yield pen.plot(
            "speed",
            "Throughput against budget",
            "decode tokens per second; a band is a budget that the clock chooses",
            drawn,
            curves.throughput({one.name: one.work for one in report.series}),
        )
    if drawn:
        words = "verify milliseconds by rows, medians and quartiles"
        yield pen.plot("costs", "Cost of a verify pass", words, drawn, curves.costs)
    if trees:
        words = "rounds that accepted at least so many draft tokens"
        yield pen.plot("depths", "Acceptance by depth", words, trees, curves.depths)
        words = "tokens committed per round, the bonus token among them"
        yield pen.plot("lengths", "Accepted lengths", words, trees, curves.lengths)
        words = "children of accepted nodes, by the draft's ranking"
        yield pen.plot("ranks", "Acceptance by sibling rank", words, trees, curves.ranks)
        words = "what the draft predicted of a path, and how often it was accepted"
        yield pen.plot("calibration", "Calibration", words, trees, curves.calibration)
    if any(len(one.chosen) > 1 for one in trees):
        words = "rounds by the nodes that they verified"
        yield pen.plot("chosen", "Nodes per round", words, trees, curves.chosen)
    if drawn:
        words = "milliseconds per round"
        plot = pen.plot("phases", "Where a round's time goes", words, drawn, curves.phases)
        yield replace(plot, legend=tuple((at, name) for name, at in curves.PHASE_COLOURS.items()))
    if any(not layer.pinned for one in drawn for layer in one.layers):
        words = "requested experts that were in memory; hollow: pinned layers"
        yield pen.plot("layers", "Hit rate by layer", words, drawn, curves.layers)


def _colours(report: Report) -> dict[str, int]:
    """A colour per series; the first plain one's is 0, a grey."""
    plain = next((one.name for one in report.series if one.plain), None)
    others = [one.name for one in report.series if one.name != plain]
    found = {name: 1 + at % (curves.COLOURS - 1) for at, name in enumerate(others)}
    return found if plain is None else {plain: 0, **found}


class _Pen:
    """Draws plots in the colours of the report's series."""

    def __init__(self, colour: dict[str, int]) -> None:
        self._colour, self._count = colour, 0

    def plot(
        self, table: str, title: str, words: str, shown: Sequence[Figures], draw: curves.Draw
    ) -> Plot:
        numbers = [self._colour[one.series] for one in shown]
        colours = [curves.SERIES[number] for number in numbers]
        names = [one.series for one in shown]
        rows = len(shown) if draw in (curves.speed, curves.phases) else 0
        svg = self._svg(lambda axes: draw(axes, shown, colours), rows)
        return Plot(title, words, svg, tuple(zip(numbers, names, strict=True)), table)

    def ratios(self, report: Report) -> Plot:
        """Speed-ups with their intervals, a row for each."""
        shown = [one for one in report.comparisons if one.speed.value is not None]
        kinds = len({one.kind for one in shown}) > 1

        def draw(axes: "Axes") -> None:
            labels = []
            for at, one in enumerate(shown):
                curves.point(axes, one.speed, at, curves.SERIES[self._colour[one.series]])
                labels.append(f"{one.series} ({one.kind})" if kinds else one.series)
            curves.rows(axes, labels)
            axes.axvline(1, color=curves.INK, linewidth=1, linestyle=(0, (4, 3)))
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
            "axes.edgecolor": curves.FAINT,
            "grid.color": curves.FAINT,
            "text.color": curves.INK,
            "axes.labelcolor": curves.INK,
            "xtick.labelcolor": curves.INK,
            "ytick.labelcolor": curves.INK,
            "xtick.color": curves.FAINT,
            "ytick.color": curves.FAINT,
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
