"""Conversion of table lines for the page, with numeric sort keys and the colors of runs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from metarun.reporting.figures.comparison import Entry
from metarun.reporting.page import Cell, Row, Table
from metarun.reporting.tables import Figure, Line

_DURATION = re.compile(r"(?:(\d+) h )?(?:(\d+) min)?(?: ?([\d.]+) s)?")
"""Format that `core.console.duration` writes."""


def table(
    title: str, lines: Sequence[Line], entries: Mapping[str, Entry] | None = None, text: str = ""
) -> Table:
    """Return lines as a table without its empty columns.

    Args:
        title: Title of the table.
        lines: One or more lines, all with the same keys.
        entries: Entries of the page's figures, by the name in the table's first column.
        text: Remark below the table.
    """
    heads = [head for head in lines[0] if any(str(line[head]) for line in lines)]
    return Table(title, heads, [_row(line, heads, entries or {}) for line in lines], text)


def _row(line: Line, heads: Sequence[str], entries: Mapping[str, Entry]) -> Row:
    cells = [_cell(line[head]) for head in heads]
    entry = entries.get(str(line[heads[0]]))
    if entry is None:
        return Row(cells)
    return Row([replace(cells[0], color=entry.color), *cells[1:]], entry.key)


def _cell(value: str | Figure) -> Cell:
    if isinstance(value, Figure):
        return Cell(str(value), value.mean)
    found = _DURATION.fullmatch(value)
    if found is not None and any(found.groups()):
        hours, minutes, seconds = (float(part or 0.0) for part in found.groups())
        return Cell(value, 3600.0 * hours + 60.0 * minutes + seconds)
    try:
        return Cell(value, float(value.replace(",", "")))
    except ValueError:
        return Cell(value)
