"""Tables of results for the terminal, Markdown, CSV, LaTeX, JSON and HTML.

Every figure is a mean over test episodes with its 95 % interval. With several seeds, episodes are
averaged over the seeds first, and the interval over the seeds is given separately.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any, Literal

from metarun.core.files import csv_cell
from metarun.core.nested import finite
from metarun.core.streams import printable, terminal_columns, wrapped

Style = Literal["terminal", "markdown", "csv", "latex", "json", "html"]


@dataclass(frozen=True)
class Figure:
    """A mean with its 95 % intervals, in the displayed unit.

    Attributes:
        mean: Mean over test episodes, which are averaged over the seeds first.
        ci95: Half-width of the interval over episodes; None or NaN if there is none.
        episodes: Number of episodes; 0 if unknown.
        seeds: Number of runs.
        seeds_ci95: Half-width of the interval over seeds; None for a single seed.
        places: Decimal places; None shows an error with two significant digits or more.
        mark: Remark in brackets after the figure.
    """

    mean: float
    ci95: float | None = None
    episodes: int = 0
    seeds: int = 1
    seeds_ci95: float | None = None
    places: int | None = None
    mark: str = ""

    def __str__(self) -> str:
        """Format as `93.4 ± 0.5`, followed by `(± 0.7 over 3 seeds, mark)` with several seeds.

        A run that diverged is shown as `not finite`.
        """
        if not math.isfinite(self.mean):
            return f"not finite ({self.mark})" if self.mark else "not finite"
        text = self._number(self.mean)
        if self.ci95 is not None and not math.isnan(self.ci95):
            text += f" ± {self._number(self.ci95)}"
        remarks = [self.mark] if self.mark else []
        if self.seeds_ci95 is not None:
            remarks.insert(0, f"± {self._number(self.seeds_ci95)} over {self.seeds} seeds")
        return f"{text} ({', '.join(remarks)})" if remarks else text

    def meets(self, other: Figure) -> bool:
        """Return whether the intervals overlap; a figure without an interval is a point."""
        widths = [w for w in (self.ci95, other.ci95) if w is not None and not math.isnan(w)]
        return abs(self.mean - other.mean) <= sum(widths)

    def columns(self) -> dict[str, str]:
        """Return the numbers as separate CSV columns, by suffix of the column name."""
        return {
            "": f"{self.mean:.6g}",
            " ci95": "" if self.ci95 is None or math.isnan(self.ci95) else f"{self.ci95:.6g}",
            " ci95 over seeds": "" if self.seeds_ci95 is None else f"{self.seeds_ci95:.6g}",
            " mark": self.mark,
        }

    def record(self) -> dict[str, Any]:
        """Return the numbers and the remark by name, for JSON."""
        return {key: value for key, value in asdict(self).items() if key != "places"}

    def _number(self, value: float) -> str:
        if abs(value) >= 1e6:
            return f"{value:.2e}"
        if self.places is not None:
            return f"{value:.{self.places}f}"
        size = abs(self.mean)
        places = 2 if size >= 0.1 or size == 0.0 else 1 - math.floor(math.log10(size))
        return f"{value:.{places}f}" if places <= _MOST_PLACES else f"{value:.1e}"


_MOST_PLACES = 7
"""Decimal places from which on a number is written with an exponent."""

Line = Mapping[str, "str | Figure"]


@dataclass(frozen=True)
class RowSeries:
    """Series of a page's figures that a row belongs to: its key, and its color in CSS."""

    key: str
    color: str


@dataclass(frozen=True)
class Table:
    """A table in any format.

    Attributes:
        title: Title of the table; may be empty.
        lines: One or more rows with the same keys, which are the column heads.
        text: Remark below the table.
        series: Series of rows by their text in the first column, for HTML.
    """

    title: str
    lines: Sequence[Line]
    text: str = ""
    series: Mapping[str, RowSeries] = field(default_factory=dict)

    @property
    def heads(self) -> list[str]:
        """Heads of all columns."""
        return list(self.lines[0])

    @property
    def used(self) -> list[str]:
        """Heads of the columns that are not empty."""
        return [head for head in self.heads if any(str(line[head]) for line in self.lines)]

    def texts(self, heads: Sequence[str]) -> list[list[str]]:
        """Return the cells of some columns as text, row by row."""
        return [[str(line[head]) for head in heads] for line in self.lines]


def render(style: Style, tables: Sequence[Table]) -> str:
    """Return tables as text.

    Args:
        style: Output format. `terminal` fits the terminal's width. `csv` joins the tables, with
            the title as first column, and puts each number of a figure in its own column. `json`
            has them under names. `latex` needs the package booktabs.
        tables: Tables in the order shown.
    """
    if style == "csv":
        return _csv([{"table": t.title, **line} for t in tables for line in t.lines])
    if style == "json":
        return f"{json.dumps([_record(t) for t in tables], indent=2, ensure_ascii=False)}\n"
    return "\n".join(_RENDERERS[style](table) for table in tables)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]], text: str = "") -> str:
    """Return a Markdown table without a title, or nothing without rows; `text` is a remark."""
    lines = [dict(zip(heads, row, strict=True)) for row in rows]
    return _markdown(Table("", lines, text)).rstrip() if lines else ""


def _csv(lines: Sequence[Line]) -> str:
    rows: list[dict[str, str]] = []
    for line in lines:
        row: dict[str, str] = {}
        for head, cell in line.items():
            if isinstance(cell, Figure):
                row |= {f"{head}{name}": text for name, text in cell.columns().items()}
            else:
                named, value = _for_programs(head, cell)
                row[named] = cell if value is None else f"{value:.15g}"
        rows.append(row)
    heads = list(dict.fromkeys(head for row in rows for head in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(csv_cell, heads))
    writer.writerows([csv_cell(row.get(head, "")) for head in heads] for row in rows)
    return out.getvalue()


def _record(table: Table) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for line in table.lines:
        row: dict[str, Any] = {}
        for head, cell in line.items():
            if isinstance(cell, Figure):
                row[head] = finite(cell.record())
            else:
                named, value = _for_programs(head, cell)
                row[named] = cell if value is None else value
        rows.append(row)
    return {"title": table.title, "rows": rows, "text": table.text}


_COUNTS = ("seeds", "episodes", "steps", "tasks", "parameters", "time", "training")
"""Heads of counts and durations, which are numbers for other programs."""


def _for_programs(head: str, cell: str) -> tuple[str, float | None]:
    """Return head and number of a cell that is a count or a duration, the latter in seconds."""
    value = _number_in(cell) if head in _COUNTS else None
    if value is None or not math.isfinite(value):
        return head, None
    if not cell[-1].isdigit():
        return f"{head}, s", value
    return head, int(value) if value.is_integer() else value


def _markdown(table: Table) -> str:
    texts = ([text.replace("|", r"\|") for text in row] for row in table.texts(table.heads))
    rows = [table.heads, ["---"] * len(table.heads), *texts]
    above = [f"**{table.title}**", ""] if table.title else []
    below = ["", table.text] if table.text else []
    return "\n".join([*above, *(f"| {' | '.join(row)} |" for row in rows), *below, ""])


def _latex(table: Table) -> str:
    heads, *rows = map(_latex_row, (table.heads, *table.texts(table.heads)))
    return "\n".join(
        [
            *([f"% {printable(table.title)}"] if table.title else []),
            rf"\begin{{tabular}}{{{'l' * len(table.heads)}}}",
            r"\toprule",
            heads,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            *([f"% {printable(table.text)}"] if table.text else []),
            "",
        ]
    )


def _latex_row(cells: Sequence[str]) -> str:
    row = " & ".join(map(_in_latex, cells))
    # After the end of a row, a bracket or a star would be an option of the command before.
    return rf"{'{}' * row.startswith(('[', '*'))}{row} \\"


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "–": "--",
    "→": r"$\to$",
    "×": r"$\times$",
    "−": "$-$",
}


def _in_latex(text: str) -> str:
    """Escape the special characters of LaTeX, and write others as commands."""
    return "".join(_LATEX.get(character, character) for character in printable(text))


def _html(table: Table) -> str:
    """Return a table with the number of each cell, by which a page can sort the rows."""
    heads = table.used
    rows = "\n".join(_html_row([line[h] for h in heads], table.series) for line in table.lines)
    head = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    title = f"<caption>{escape(table.title)}</caption>\n" if table.title else ""
    text = f'\n<p class="small">{escape(table.text)}</p>' if table.text else ""
    return (
        f"<table>\n{title}<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n"
        f"</table>{text}\n"
    )


def _html_row(cells: Sequence[str | Figure], series: Mapping[str, RowSeries]) -> str:
    own = series.get(str(cells[0]))
    row, dot = "<tr>", ""
    if own is not None:
        row = f'<tr data-series="{escape(own.key)}" tabindex="0">'
        dot = f'<span class="dot" style="background: {escape(own.color)}"></span>'
    shown = [_html_cell(cell, "" if place else dot) for place, cell in enumerate(cells)]
    return f"{row}{''.join(shown)}</tr>"


def _html_cell(cell: str | Figure, dot: str) -> str:
    value = cell.mean if isinstance(cell, Figure) else _number_in(cell)
    marks = ""
    if value is not None and math.isfinite(value):
        marks = f' class="number" data-value="{value}"'
    return f"<td{marks}>{dot}{escape(str(cell))}</td>"


_DURATION = re.compile(r"(?:(\d+) h )?(?:(\d+) min)?(?: ?([\d.]+) s)?")
"""Format that `core.console.duration` writes."""


def _number_in(text: str) -> float | None:
    """Return the number or the duration that a text is, the latter in seconds."""
    found = _DURATION.fullmatch(text)
    if found is not None and any(found.groups()):
        hours, minutes, seconds = (float(part or 0.0) for part in found.groups())
        return 3600.0 * hours + 60.0 * minutes + seconds
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _terminal(table: Table) -> str:
    """Return aligned columns, or a paragraph for each row where they are wider than the terminal.

    Words are never broken. Empty columns are left out. The text that all rows share is given once,
    below the title.
    """
    width, shared = terminal_columns(), _shared(table)
    used = [head for head in table.used if head not in shared]
    heads = list(map(printable, used))
    rows = [list(map(printable, row)) for row in table.texts(used)]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    head, *body = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (heads, *rows)]
    rule = "─" * max(map(len, (head, *body)))
    if len(rule) > width:
        rule = "─" * width
        head, body = "", _stacked(heads, rows, width)
    facts = [printable(f"{head}: {text}") for head, text in shared.items()]
    above = [*wrapped(table.title, width), *_joined(facts, "; ", width)]
    top = [rule, head, rule] if head else [rule]
    return "\n".join([*above, *top, *body, rule, *wrapped(table.text, width), ""])


def _shared(table: Table) -> dict[str, str]:
    """Return the texts that all rows of a table of several rows share, by head."""
    first, *others = table.lines
    found = {
        head: text
        for head in table.used
        if isinstance(text := first[head], str) and all(line[head] == text for line in others)
    }
    return found if others and len(found) < len(table.used) else {}


def _stacked(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return a paragraph for each row: its first cell, and `key  value` lines for the others."""
    longest = max(map(len, heads[1:]), default=0)
    lines: list[str] = []
    for first, *cells in rows:
        lines += ["", *wrapped(first or "–", width)] if lines else wrapped(first or "–", width)
        for key, cell in zip(heads[1:], cells, strict=True):
            lines += wrapped(cell, width, f"  {key:<{longest}}  ") if cell else []
    return lines


def _joined(parts: Sequence[str], mark: str, width: int) -> list[str]:
    """Return texts joined in as few lines as fit, each text on one line where it fits."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + len(mark) + len(part) <= width:
            lines[-1] += f"{mark}{part}"
        else:
            lines += wrapped(part, width)
    return lines


_RENDERERS: dict[Style, Callable[[Table], str]] = {
    "terminal": _terminal,
    "markdown": _markdown,
    "latex": _latex,
    "html": _html,
}


def shown(value: float, *, accuracy: bool) -> Figure:
    """Return a fraction as an accuracy in percent, or an error unchanged."""
    return Figure(100.0 * value, places=1) if accuracy else Figure(value)
