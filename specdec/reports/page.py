"""The report as one HTML page: nothing is fetched, everything that a model wrote is escaped."""

from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from specdec import __version__
from specdec.intervals import told
from specdec.reports.formats import about
from specdec.reports.plots import plots
from specdec.reports.report import Report
from specdec.reports.samples import samples
from specdec.reports.tables import tables, unit
from specdec.units import percent

TEMPLATE = Path(__file__).with_name("page.html.jinja")


class Tile(NamedTuple):
    """A figure at the top of the page."""

    value: str
    label: str
    words: str


def page(report: Report) -> str:
    """The page as text. SpecdecError without matplotlib."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=", ".join(dict.fromkeys(file.path.name for file in report.files)),
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        about=about(report),
        warnings=report.warnings,
        tiles=_tiles(report),
        plots=list(plots(report)),
        tables=list(tables(report)),
        samples=list(samples(report)),
    )


def _tiles(report: Report) -> list[Tile]:
    """The fastest run against plain decoding, and what its draft is worth."""
    totals = [one for one in report.totals if one.speed.value is not None]
    plains = {one.series: one for one in totals if one.budget == 1}
    rivals = {one.series: one.against for one in report.comparisons if one.against in plains}
    best = max(
        (one for one in totals if one.budget != 1),
        key=lambda one: (one.series in rivals, one.speed.value or 0.0),
        default=None,
    )
    plain = next(iter(plains.values()), None) if best is None else None
    if best is not None and best.series in rivals:
        plain = plains[rivals[best.series]]
    tiles = []
    for one in (plain, best):
        if one is not None:
            words = f"{one.series}; {_interval(told(one.speed, 1))}"
            tiles.append(Tile(f"{one.speed.value:.1f}", "tokens per second", words))
    if best is None:
        return tiles
    for verdict in report.comparisons:
        ratio = verdict.speed
        ours = plain is not None and verdict.against == plain.series
        ours = ours and (verdict.series, verdict.kind) == (best.series, best.kind)
        if ours and ratio.value is not None:
            words = f"against {verdict.against}; {_interval(told(ratio))}, {unit(ratio)}"
            tiles.append(Tile(f"{ratio.value:.2f}x", "as fast", words))
            equal = "equal" if verdict.tokens_equal else "DIFFER"
            tiles.append(Tile(equal, "tokens", f"{best.series} and {verdict.against}"))
            break
    if best.length.value is not None:
        words = f"{best.series}; {_interval(told(best.length))}"
        tiles.append(Tile(f"{best.length.value:.2f}", "tokens per round", words))
    off = best.calibration.error
    if off is not None:
        tiles.append(Tile(percent(off), "calibration error", f"{best.series}, of path weights"))
    return tiles


def _interval(text: str) -> str:
    """The interval alone, out of "1.31 (1.22 to 1.40)"."""
    return text.partition("(")[2].rstrip(")") or "too little for an interval"
