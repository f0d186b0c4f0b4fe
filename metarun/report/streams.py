"""Figures of a run on a stream: the matrix of tasks after tasks, and what happens along it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metarun.intervals import Floats

_BLUE = "#0072B2"  # of Okabe and Ito's colours, which colour-blind people tell apart
_STYLE: Any = {
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "metarun",
}
_DPI = 150


def draw(folder: Path) -> list[Path]:
    """Write `figures/matrix` and `figures/stream`, each as PNG and SVG.

    Args:
        folder: Of a run or of a test on a stream, with its `results.json`, `episodes.npz` and
            `stream.csv`.

    Returns:
        The files.
    """
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    with np.load(folder / "episodes.npz") as arrays:
        matrix = arrays["matrix"].mean(0)
    with (folder / "stream.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    title = f"{results['algo']} on {results['data']}, seed {results['seed']}"
    with rc_context(_STYLE):
        figures = {
            "matrix": _matrix(matrix, results, title),
            "stream": _curves(rows, results, title),
        }
        return [path for name, figure in figures.items() for path in _save(folder, name, figure)]


def _matrix(matrix: Floats, results: dict[str, Any], title: str) -> Figure:
    """A heat map: a row before the first visit and after each, a column for each task."""
    figure = Figure(figsize=(6.4, 5.2))
    axes = figure.add_subplot()
    best = "viridis" if results["metric"] == "accuracy" else "viridis_r"
    # One task that diverges would leave no colours for the others.
    top = float(np.nanquantile(matrix, 0.98)) if np.isfinite(matrix).any() else 1.0
    image = axes.imshow(matrix, aspect="auto", cmap=best, vmin=0.0, vmax=top, origin="upper")
    figure.colorbar(image, ax=axes, label=f"{results['metric']} on held-out rows")
    axes.set(title=title, xlabel="task", ylabel="visits so far")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[:].set_visible(False)
    return figure


def _curves(rows: list[dict[str, str]], results: dict[str, Any], title: str) -> Figure:
    """Three panels over the rows of the stream, each with its 95 % interval over lifetimes."""
    metric = results["metric"]
    figure = Figure(figsize=(6.4, 7.2))
    figure.suptitle(title)
    panels = figure.subplots(3, 1)
    met = [row for row in rows if row["seen"]]
    _band(panels[0], rows, "rows", "current")
    panels[0].set(xlabel="rows of the stream", ylabel=f"{metric}\non the task at hand")
    _band(panels[1], rows, "rows", "cumulative_loss")
    panels[1].set(xlabel="rows of the stream", ylabel="cumulative loss\nof incoming rows")
    _band(panels[2], met, "rows", "seen")
    panels[2].set(xlabel="rows of the stream", ylabel=f"{metric}\non all tasks met")
    for axes in panels:
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    return figure


def _band(axes: Axes, rows: list[dict[str, str]], across: str, name: str) -> None:
    x = np.array([float(row[across]) for row in rows])
    y = np.array([float(row[name] or "nan") for row in rows])
    width = np.array([float(row[f"{name}_ci95"] or "nan") for row in rows])
    axes.plot(x, y, color=_BLUE, linewidth=1.5)
    axes.fill_between(x, y - width, y + width, color=_BLUE, alpha=0.2, linewidth=0)


def _save(folder: Path, name: str, figure: Figure) -> list[Path]:
    place = folder / "figures"
    place.mkdir(exist_ok=True)
    paths = [place / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=_DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths
