"""A report as text, as Markdown, and as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from specdec.intervals import CONFIDENCE
from specdec.reports.report import Report
from specdec.reports.tables import Table, tables
from specdec.run_file import RunFile
from specdec.units import size
from specdec.units import table as columns

SCHEMA = 1
"""Raised when a field of the JSON changes its meaning or goes; new fields do not raise it."""


def text(report: Report) -> str:
    """Tables for a terminal."""
    blocks = ["\n".join(f"{name}: {words}" for name, words in about(report))]
    blocks += ["\n".join(report.warnings)] if report.warnings else []
    for one in tables(report):
        rows = columns([one.header, *one.rows], one.left)
        blocks.append(f"{one.title}\n{one.note}\n{rows}")
    return "\n\n".join(blocks)


def markdown(report: Report) -> str:
    """The same as Markdown."""
    blocks = ["# specdec report"]
    blocks.append("\n".join(f"- {_cell(name)}: {_cell(words)}" for name, words in about(report)))
    blocks += ["\n".join(f"**{_cell(words)}**  " for words in report.warnings)]
    blocks += [f"## {one.title}\n\n{one.note}\n\n{_table(one)}" for one in tables(report)]
    return "\n\n".join(block for block in blocks if block)


def document(report: Report) -> dict[str, Any]:
    """The figures as they were computed."""
    return {
        "schema": SCHEMA,
        "kind": "report",
        "confidence": CONFIDENCE,
        "files": [
            {
                "path": str(file.path),
                "kind": file.kind,
                "partial": file.partial,
                "specdec": file.version,
                "environment": file.environment,
                "settings": file.settings,
            }
            for file in report.files
        ],
        "warnings": list(report.warnings),
        "figures": [asdict(one) for one in report.figures],
        "comparisons": [asdict(one) for one in report.comparisons],
    }


def as_json(report: Report) -> str:
    """`document` as text."""
    return json.dumps(document(report), indent=2, ensure_ascii=False, allow_nan=False)


def about(report: Report) -> list[tuple[str, str]]:
    """Each file, and what it is of."""
    return [(str(file.path), _file(file)) for file in report.files]


def _file(file: RunFile) -> str:
    where, settings = file.environment, file.settings
    parts = [
        f"specdec {file.version} {file.kind}",
        f"{settings.get('model') or 'the demo pair'}",
        f"{len(file.runs)} runs",
        f"{where.get('processor') or where.get('machine')}, {where.get('cores', '?')} cores",
        f"kernels {where.get('kernels')} on {_device(where)}, MLX {where.get('mlx')}",
        f"plan {size(file.plan.total)}, {len(file.plan.pinned)} layers pinned",
    ]
    return "; ".join(parts)


def _device(where: Mapping[str, Any]) -> str:
    """What computed, and how many threads where that can be chosen."""
    threads = where.get("threads")
    return f"{where.get('device')}" + (f" ({threads} threads)" if threads else "")


def _table(one: Table) -> str:
    lines = [one.header, tuple(":--" if at in one.left else "--:" for at in range(len(one.header)))]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in [*lines, *one.rows])


def _cell(words: str) -> str:
    """Words that stay words in Markdown, and in a cell."""
    for mark in "\\`*_[]<>|#":
        words = words.replace(mark, "\\" + mark)
    return words.replace("\n", " ")
