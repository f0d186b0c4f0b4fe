"""Style, colors and files that all figures share."""

from __future__ import annotations

import csv
import hashlib
import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from metarun.core.files import csv_cell, inner_folder, write_atomically
from metarun.core.statistics import Floats

# The palette of Okabe and Ito, which is distinguishable with color blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
RIGHT, WRONG = COLORS[0], COLORS[1]
INK, MUTED, RULE, PAPER = "#1c2127", "#66707b", "#dde1e6", "#fefefe"
"""Colors on a white background; the page replaces them with those of its theme."""
STYLE: Any = {
    "figure.constrained_layout.use": True,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "metarun",
}
_SETTLED = {**STYLE, "figure.constrained_layout.use": False}
"""Style for saving a figure whose layout is already computed."""
SIZE = (4.8, 3.2)
"""Size in inches of a figure with one panel, readable on a phone without scaling."""
_DPI = 150
_POINTS_PER_INCH = 72.0
_LETTER, _KEY = 4.2, 42.0
"""Points of a letter of a legend, and of the line or marker in front of a name."""
_ROW = 0.18
"""Inches of a row of a legend or of small text."""
_SALT = 7765
"""Salt of the hash, chosen so that six common algorithms have six different colors.

They are maml, protonet, reptile, fomaml, matching and anil.
"""
_FAR = 20.0
"""Ratio of the largest to the smallest error above which an axis is logarithmic."""


@dataclass(frozen=True)
class Series:
    """A part of a figure that the reader can hide: the artists whose `gid` begins with its key.

    Attributes:
        name: Name in the legend.
        color: Color of the artists.
        dash: Line style.
        marker: Marker of points, which have no line.
        alpha: Opacity.
    """

    name: str
    color: str
    dash: str = "-"
    marker: str = ""
    alpha: float = 1.0


@dataclass(frozen=True)
class Panel:
    """A figure with its texts and numbers.

    Attributes:
        name: Name of its files, unique in a report.
        title: Title of a few words.
        caption: Description of what is shown, in a sentence or two.
        alt: Alternative text for readers who do not see the figure.
        figure: Matplotlib figure, created under `STYLE`.
        columns: Numbers by column, all of the same length.
        series: Parts that can be hidden, by the beginning of their artists' `gid`.
        wide: Whether the figure takes a full row of the page.
    """

    name: str
    title: str
    caption: str
    alt: str
    figure: Figure
    columns: Mapping[str, Sequence[Any]]
    series: Mapping[str, Series] | None = None
    wide: bool = False


def colors(algorithms: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return a color and a line style for each algorithm, mostly the same in every report.

    A hash of the name gives an algorithm's place among them. Algorithms are placed in
    alphabetical order; one whose place is taken in this report gets the next free one.
    """
    # Gray is reserved for everything that is not an algorithm.
    places = [(color, dash) for dash in DASHES for color in COLORS[:-1]]
    taken: dict[str, int] = {}
    for name in sorted(set(algorithms)):
        wanted = _place(name)
        turns = range(len(places))
        free = (k for n in turns if (k := (wanted + n) % len(places)) not in taken.values())
        taken[name] = next(free, wanted)
    return {name: places[place] for name, place in taken.items()}


def _place(name: str) -> int:
    digest = hashlib.blake2b(f"{_SALT} {name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % (len(COLORS) - 1)


def named_rows(
    names: Sequence[str], height: float, fontsize: float = 7
) -> tuple[Figure, Axes, Floats]:
    """Return an empty figure with a row for each name, the first on top.

    Args:
        names: Names of the rows.
        height: Height of a row in inches.
        fontsize: Font size of the names.

    Returns:
        The figure, its axes, and the position of each row.
    """
    figure = Figure(figsize=(SIZE[0], 0.9 + height * len(names)))
    axes = figure.add_subplot()
    places = np.arange(len(names), dtype=np.float64)[::-1]
    axes.set_yticks(places, list(names), fontsize=fontsize)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.grid(visible=False, axis="y")
    return figure, axes, places


def error_axis(axes: Axes, values: Floats) -> None:
    """Start an axis of errors at zero, or make it logarithmic for a wide range of values."""
    here = values[np.isfinite(values)]
    if not len(here):
        return
    if 0.0 < _FAR * here.min() < here.max():
        axes.set_yscale("log")
        plain(axes.yaxis)
    else:
        axes.set_ylim(bottom=0.0)


def plain(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers instead of powers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def band(axes: Axes, x: Any, mean: Floats, width: Floats, color: str, gid: str) -> None:
    """Draw the 95 % interval around a line."""
    shown = axes.fill_between(x, mean - width, mean + width, color=color, alpha=0.2, linewidth=0)
    shown.set_gid(f"{gid}-band")


def table(columns: Mapping[str, Sequence[Any]]) -> str:
    """Return columns of equal length as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(csv_cell, columns))
    writer.writerows(zip(*(map(_cell, values) for values in columns.values()), strict=True))
    return out.getvalue()


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    return str(csv_cell(str(value)))


def write(folder: Path, panel: Panel, about: str = "") -> tuple[str, str]:
    """Write a panel as PNG, SVG and CSV; the pictures have its title and legend.

    Args:
        folder: Folder of the files.
        panel: The panel.
        about: Line below the title, such as the run that is shown.

    Returns:
        The SVG, and the `viewBox` of its part without title and legend.
    """
    inner_folder(folder)
    view = _framed(panel, about)
    svg = _drawn(panel.figure, "svg").decode()
    write_atomically(folder / f"{panel.name}.svg", svg.encode())
    write_atomically(folder / f"{panel.name}.png", _drawn(panel.figure, "png"))
    write_atomically(folder / f"{panel.name}.csv", table(panel.columns).encode())
    return svg, view


def file_of(panel: Panel, about: str, kind: str) -> bytes:
    """Return a panel with its title and legend as a file of `kind` `svg` or `png`."""
    _framed(panel, about)
    return _drawn(panel.figure, kind)


def _framed(panel: Panel, about: str) -> str:
    """Add a title above a figure and its legend below, and return the `viewBox` between them."""
    figure, series = panel.figure, list((panel.series or {}).values())
    _lay_out(figure)
    width, height = map(float, figure.get_size_inches())
    longest = max((len(one.name) for one in series), default=0)
    columns = max(1, int(_POINTS_PER_INCH * width / (_LETTER * longest + _KEY)))
    lines = textwrap.wrap(about, int(_POINTS_PER_INCH * width / _LETTER))
    above = _ROW * (1.5 + len(lines))
    below = _ROW * (0.3 + -(-len(series) // columns)) if series else 0.0
    whole = height + above + below

    def moved(y: float) -> float:
        return (y * height + below) / whole

    for axes in figure.axes:
        box = axes.get_position()
        axes.set_position((box.x0, moved(box.y0), box.width, box.height * height / whole))
    for text in figure.texts:
        text.set_y(moved(text.get_position()[1]))
    figure.set_size_inches(width, whole)
    figure.text(0.02, 1.0 - 0.3 * _ROW / whole, panel.title, va="top", fontsize=11, weight="bold")
    figure.text(0.02, 1.0 - 1.5 * _ROW / whole, "\n".join(lines), va="top", fontsize=8, color=MUTED)
    if series:
        handles = list(map(_handle, series))
        figure.legend(handles=handles, loc="lower center", ncols=columns, borderaxespad=0.2)
    points = (0.0, above, width, height)
    return " ".join(f"{_POINTS_PER_INCH * value:g}" for value in points)


def _handle(series: Series) -> Line2D:
    """Return the entry of a series in a legend."""
    line = Line2D([], [], color=series.color, alpha=series.alpha, linewidth=1.8, label=series.name)
    line.set(linestyle="none" if series.marker else series.dash, marker=series.marker or "none")
    return line


def _lay_out(figure: Figure) -> None:
    """Compute the layout once; with a layout engine, every save would draw the figure twice."""
    engine = figure.get_layout_engine()
    with rc_context(_SETTLED):
        if engine is not None:
            engine.execute(figure)
        figure.set_layout_engine(None)


def _drawn(figure: Figure, kind: str) -> bytes:
    """Return a figure's file without a date, so that equal figures give equal files."""
    buffer = io.BytesIO()
    # Each save sets the layout engine again from these settings.
    with rc_context(_SETTLED):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(buffer, format=kind, dpi=_DPI, metadata=metadata)
    return buffer.getvalue()
