"""Curves: what each plot of a report shows, drawn on matplotlib's axes in stand-in colours."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from specdec.intervals import Estimate
from specdec.reports.figures import Figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw = Callable[["Axes", Sequence[Figures], Sequence[str]], None]
"""Figures, and the colour of each."""

COLOURS = 8
"""Series colours of the page; more series use them again."""

INK, FAINT = "#00000a", "#00000b"
SERIES = tuple(f"#0000c{at}" for at in range(COLOURS))
PHASE_COLOURS = {"draft": 2, "build": 4, "verify": 1, "commit": 3, "other": 0}

LABEL = 34
"""Characters of a name beside an axis."""


def rows(axes: "Axes", names: Sequence[str]) -> None:
    """A row per name, the first on top."""
    short = [name if len(name) <= LABEL else name[: LABEL - 1] + "…" for name in names]
    axes.set_yticks(range(len(names)), short)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def point(axes: "Axes", of: Estimate, row: float, colour: str) -> None:
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


def speed(axes: "Axes", shown: Sequence[Figures], colours: Sequence[str]) -> None:
    for at, one in enumerate(shown):
        point(axes, one.speed, at, colours[at])
    rows(axes, [one.series for one in shown])
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens per second")


def throughput(work: dict[str, str]) -> Draw:
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


def costs(axes: "Axes", shown: Sequence[Figures], colours: Sequence[str]) -> None:
    for one, colour in zip(shown, colours, strict=True):
        of = [(at.rows, Estimate(at.median, at.low, at.high)) for at in one.costs]
        _curve(axes, of, colour, "o-")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("rows verified")
    axes.set_ylabel("ms")


def depths(axes: "Axes", shown: Sequence[Figures], colours: Sequence[str]) -> None:
    _side_by_side(
        axes, [[(d.depth, d.reached) for d in one.depths] for one in shown], colours, "o-"
    )
    axes.set_xlabel("draft tokens accepted, at least")


def ranks(axes: "Axes", shown: Sequence[Figures], colours: Sequence[str]) -> None:
    _side_by_side(axes, [[(r.rank, r.rate) for r in one.ranks] for one in shown], colours, "o")
    axes.set_xlabel("rank among siblings (0: likeliest)")


def lengths(axes: "Axes", shown: Sequence[Figures], colours: Sequence[str]) -> None:
    _histogram(axes, [[(b.length, b.share) for b in one.lengths] for one in shown], colours)
    axes.set_xlabel("tokens committed by a round")


def chosen(axes: "Axes", shown: Sequence[Figures], colours: Sequence[str]) -> None:
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


def _side_by_side(
    axes: "Axes",
    series: Sequence[Sequence[tuple[float, Estimate]]],
    colours: Sequence[str],
    line: str,
) -> None:
    """Shares at whole numbers, those of each series a little aside of the others'."""
    for at, (points, colour) in enumerate(zip(series, colours, strict=True)):
        aside = 0.06 * (at - (len(series) - 1) / 2)
        _curve(axes, [(x + aside, y) for x, y in points], colour, line)
    _shares(axes)


def _shares(axes: "Axes") -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.locator_params(axis="x", integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def calibration(axes: "Axes", shown: Sequence[Figures], colours: Sequence[str]) -> None:
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)))
    for one, colour in zip(shown, colours, strict=True):
        _curve(axes, [(b.predicted, b.accepted) for b in one.calibration.bins], colour, "o")
    _shares(axes)
    axes.locator_params(axis="x", integer=False)
    axes.set_xlim(-0.03, 1.03)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlabel("predicted")
    axes.set_ylabel("accepted")


def phases(axes: "Axes", shown: Sequence[Figures], _: Sequence[str]) -> None:
    for at, one in enumerate(shown):
        left = 0.0
        for phase in one.phases:
            colour = SERIES[PHASE_COLOURS[phase.name]]
            axes.barh(at, phase.ms_per_round, 0.62, left, color=colour)
            left += phase.ms_per_round
    rows(axes, [one.series for one in shown])
    axes.set_xlabel("milliseconds per round")


def layers(axes: "Axes", shown: Sequence[Figures], colours: Sequence[str]) -> None:
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
