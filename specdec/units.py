"""Figures as people read them. Bytes in powers of ten, as disks and `--memory-gb` count them."""

from collections.abc import Collection, Sequence


def size(count: float) -> str:
    """Bytes with a unit, three significant digits: "812 B", "1.23 MB", "45.6 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5 or unit == "GB":
            break
        count /= 1000
    if unit == "B":
        return f"{count:.0f} B"
    digits = 2 if abs(count) < 9.995 else 1 if abs(count) < 99.95 else 0
    return f"{count:.{digits}f} {unit}"


def number(value: float | None, digits: int = 1) -> str:
    """A figure, or a dash when there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def interval(low: float | None, high: float | None) -> str:
    """From a figure to another, or a dash when there is none."""
    return "-" if low is None or high is None else f"{low:.2f}-{high:.2f}"


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal, or a dash."""
    return "-" if share is None else f"{100 * share:.1f} %"


def table(rows: Sequence[tuple[str, ...]], left: Collection[int] = (0,)) -> str:
    """Columns of equal width, those numbered in `left` flush left, the others flush right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at in left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
