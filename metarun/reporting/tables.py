"""Tables of results for the terminal, Markdown, CSV and LaTeX.

Every figure is a mean over test episodes with its 95 % interval. With several seeds, episodes are
averaged over the seeds first, and the interval over the seeds is given separately.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Style = Literal["terminal", "markdown", "csv", "latex"]


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

    def _number(self, value: float) -> str:
        if abs(value) >= 1e6:
            return f"{value:.2e}"
        if self.places is not None:
            return f"{value:.{self.places}f}"
        size = abs(self.mean)
        places = 2 if size >= 0.1 or size == 0.0 else 1 - math.floor(math.log10(size))
        return f"{value:.{places}f}"


Line = Mapping[str, "str | Figure"]


def tables(style: Style, parts: Sequence[tuple[str, Sequence[Line]]]) -> str:
    """Return several tables as text; `csv` joins them and adds a first column with the title.

    Args:
        style: Output format, see `table`; `csv` puts each number of a figure in its own column.
        parts: Title and lines of each table, see `table`.
    """
    if style == "csv":
        return _csv([{"table": title, **line} for title, lines in parts for line in lines])
    return "\n".join(table(style, title, lines) for title, lines in parts)


def table(style: Style, title: str, lines: Sequence[Line]) -> str:
    """Return a table as text; the column heads are the keys of the first line.

    Args:
        style: Output format; `terminal` aligns columns and leaves out empty ones.
        title: Title of the table.
        lines: One or more lines, all with the same keys.
    """
    heads = list(lines[0])
    cells = [[str(line[head]) for head in heads] for line in lines]
    if style == "markdown":
        body = [markdown_row(heads), markdown_row(["---"] * len(heads)), *map(markdown_row, cells)]
        return "\n".join([f"**{title}**", "", *body, ""])
    if style == "latex":
        return _latex(title, heads, cells)
    plain = [
        n for n, head in enumerate(heads) if all(isinstance(line[head], str) for line in lines)
    ]
    return _terminal(title, heads, cells, plain)


def _csv(lines: Sequence[Line]) -> str:
    rows: list[dict[str, str]] = []
    for line in lines:
        row: dict[str, str] = {}
        for head, cell in line.items():
            if isinstance(cell, Figure):
                row |= {f"{head}{name}": text for name, text in cell.columns().items()}
            else:
                row[head] = cell
        rows.append(row)
    heads = list(dict.fromkeys(head for row in rows for head in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, heads, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _latex(title: str, heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    rows = [" & ".join(map(_escaped, row)) + r" \\" for row in (heads, *cells)]
    columns = "l" * len(heads)
    return "\n".join(
        [
            f"% {title}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\hline",
            rows[0],
            r"\hline",
            *rows[1:],
            r"\hline",
            r"\end{tabular}",
            "",
        ]
    )


def _escaped(text: str) -> str:
    """Escape the special characters of LaTeX."""
    marked = "".join("\\" + c if c in "&%$#_{}" else c for c in text)
    return marked.replace("±", r"$\pm$").replace("–", "--")


def _terminal(
    title: str, heads: Sequence[str], cells: Sequence[Sequence[str]], plain: Sequence[int]
) -> str:
    """Return aligned columns; figures are never truncated or wrapped.

    Empty columns are left out. The text that all rows of a longer table share is given once,
    below the title. `plain` are the columns without figures.
    """
    found = [{row[column] for row in cells} - {""} for column in range(len(heads))]
    common = [n for n in plain if n > 0 and len(cells) > 2 and len(found[n]) == 1]
    kept = [column for column in range(len(heads)) if found[column] and column not in common]
    rows = [[row[column] for column in kept] for row in (heads, *cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    rule = "─" * max(map(len, lines))
    shared = [f"{heads[column]}: {min(found[column])}" for column in common]
    above = [title, "; ".join(shared)] if shared else [title]
    return "\n".join([*above, rule, lines[0], rule, *lines[1:], rule, ""])


def shown(value: float, *, accuracy: bool) -> Figure:
    """Return a fraction as an accuracy in percent, or an error unchanged."""
    return Figure(100.0 * value, places=1) if accuracy else Figure(value)


def markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
