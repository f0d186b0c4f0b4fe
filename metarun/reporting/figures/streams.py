"""Figures of a run on a stream: the matrix of tasks by visits, and curves along the stream."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metarun.core.results import Results
from metarun.core.statistics import Floats, quiet
from metarun.core.types import Stream
from metarun.evaluation import continual_metrics
from metarun.reporting.figures.curves import unit
from metarun.reporting.figures.drawing import COLORS, SIZE, STYLE, Panel, colors, save
from metarun.reporting.run_files import RunFiles
from metarun.runs.folder import RunFolder

_MANY_VISITS = 20
_FAR = 1000.0
"""Ratio of the worst to the best curve above which the worst is cut off."""


@quiet
def panels(run: RunFiles) -> list[Panel]:
    """Return the matrix and the curves of a stream; none for other tasks."""
    results = run.results
    if results is None or "matrix" not in run.arrays or not (run.path / "stream.csv").exists():
        return []
    matrix = run.arrays["matrix"].mean(0)
    with (run.path / "stream.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    algo, metric = str(results["algo"]), str(results["metric"])
    at = [(i, j) for i, j in np.ndindex(*matrix.shape)]
    summary = f"{matrix.shape[0]} rows, before the first visit and after each"
    return [
        Panel(
            "matrix",
            "Tasks after visits",
            f"{metric} on held-out rows of each task (column) after each visit (row), mean over "
            f"{results['test']['episodes']} test streams: {summary}. A forgotten task fades "
            "down its column.",
            f"A map of {matrix.shape[1]} tasks against visits: {summary}.",
            _matrix(matrix, results, run.title),
            {
                "visits so far": [i for i, _ in at],
                "task": [j for _, j in at],
                metric: [float(matrix[place]) for place in at],
            },
        ),
        Panel(
            "stream",
            "Along the stream",
            f"The {metric} on the current task, the cumulative loss of incoming rows, and the "
            f"{metric} on all tasks seen, with the 95 % interval over test streams.",
            f"Three curves along {len(rows)} steps of the stream.",
            _panels({algo: rows}, results, run.title, {algo: (run.color, "-")}),
            {name: [row[name] for row in rows] for name in (rows[0] if rows else [])},
        ),
    ]


@quiet
def draw_together(folders: Mapping[str, Sequence[Path]], name: Path) -> list[Path]:
    """Write the curves of several algorithms along the same streams as one PNG and SVG.

    Args:
        folders: Run folders of each algorithm, one for each seed.
        name: Path of the files without suffix.

    Returns:
        Paths of the written files.
    """
    figure, _ = together(folders, colors(folders))
    return save(name.parent, name.name, figure)


@quiet
def together(
    folders: Mapping[str, Sequence[Path]], looks: Mapping[str, tuple[str, str]]
) -> tuple[Figure, dict[str, list[Any]]]:
    """Return a figure of several algorithms along the same streams, and its numbers.

    Args:
        folders: Run folders of each algorithm, one for each seed. Each test stream is averaged
            over the seeds before the interval is computed.
        looks: Color and line style of each algorithm.
    """
    curves: dict[str, list[dict[str, str]]] = {}
    for algo, runs in folders.items():
        about = RunFolder(runs[0]).read_results()
        stream_record = [_stream_record(run) for run in runs]
        mean = {n: np.mean([one[n] for one in stream_record], axis=0) for n in stream_record[0]}
        stream = Stream.of(about["layout"])
        curves[algo] = list(csv.DictReader(io.StringIO(continual_metrics.curves(mean, stream))))
    names = list(next(iter(curves.values()))[0])
    columns: dict[str, list[Any]] = {"run": [a for a, rows in curves.items() for _ in rows]}
    columns |= {n: [row[n] for rows in curves.values() for row in rows] for n in names}
    with rc_context(STYLE):
        return _panels(curves, about, f"along {about['data']}", looks), columns


def _matrix(matrix: Floats, results: Results, heading: str) -> Figure:
    """Draw a heat map with a column for each task, a row before the first visit and after each."""
    scale, label = unit(str(results["metric"]))
    figure = Figure(figsize=(SIZE[0], 4.0))
    axes = figure.add_subplot()
    best = "viridis" if results["metric"] == "accuracy" else "viridis_r"
    # One task that diverges would leave no colors for the others.
    top = scale * float(np.nanquantile(matrix, 0.98)) if np.isfinite(matrix).any() else scale
    image = axes.imshow(
        scale * matrix, aspect="auto", cmap=best, vmin=0.0, vmax=top, origin="upper"
    )
    figure.colorbar(image, ax=axes, label=label)
    axes.set(title=heading, xlabel="task", ylabel="visits so far")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return figure


def _stream_record(run: Path) -> dict[str, Floats]:
    names = ("incoming", "incoming_loss", "current", "matrix")
    return RunFolder(run).read_episodes(lambda name: name in names)


def _panels(
    curves: Mapping[str, list[dict[str, str]]],
    results: Results,
    heading: str,
    looks: Mapping[str, tuple[str, str]],
) -> Figure:
    """Draw three panels over the rows of the stream, with 95 % intervals over test streams."""
    scale, metric = unit(str(results["metric"]))
    metric = metric.replace("mean squared error", "squared error")
    # With many visits, a curve within each of them would merge into a block of color.
    many = len(results["layout"]["visits"]) > _MANY_VISITS
    figure = Figure(figsize=(SIZE[0], 6.4))
    figure.suptitle(heading, fontsize=10)
    drawn = figure.subplots(3, 1)
    names = ("current", "cumulative_loss", "seen")
    labels = (
        f"{metric}\non the task just learned" if many else f"{metric}\non the current task",
        "cumulative loss\nof incoming rows",
        f"{metric}\non all tasks seen",
    )
    for axes, name, label in zip(drawn, names, labels, strict=True):
        tops = []
        for algo, rows in curves.items():
            ends = many and name == "current"
            here = [row for row in rows if row[name] and (row["seen"] or not ends)]
            x, y, width = _columns(here, name)
            if name != "cumulative_loss":
                y, width = scale * y, scale * width
            color, dash = looks[algo]
            axes.plot(x, y, color=color, linestyle=dash, linewidth=1.5, label=algo)
            if len(curves) <= len(COLORS):
                axes.fill_between(x, y - width, y + width, color=color, alpha=0.2, linewidth=0)
            tops.append(np.nanquantile(y, 0.98) if np.isfinite(y).any() else 0.0)
        axes.set(ylabel=label, xlim=(0, None), ylim=(0, None))
        # An accuracy cannot exceed 100 %, even if its interval does.
        if scale > 1.0 and name != "cumulative_loss":
            axes.set_ylim(top=min(axes.get_ylim()[1], 1.04 * scale))
        # A curve that diverges would flatten the others.
        positive = [top for top in tops if top > 0]
        if positive and max(positive) > _FAR * min(positive):
            axes.set_ylim(top=_FAR / 10 * min(positive))
    drawn[-1].set_xlabel("rows of the stream")
    if len(curves) > 1:
        handles, texts = drawn[0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _columns(rows: list[dict[str, str]], name: str) -> tuple[Floats, Floats, Floats]:
    """Return the rows of the stream so far, a curve, and the half-widths of its intervals."""
    columns = [[float(row[n] or "nan") for row in rows] for n in ("rows", name, f"{name}_ci95")]
    x, y, width = (np.array(column) for column in columns)
    return x, y, width
