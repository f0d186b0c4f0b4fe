"""Figures of a run on a stream: the matrix of tasks by visits, and curves along the stream."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metarun.core.results import Results
from metarun.core.statistics import Floats, quiet
from metarun.core.types import Stream
from metarun.evaluation import continual_metrics
from metarun.reporting.figures.curves import unit
from metarun.reporting.figures.drawing import (
    COLORS,
    DASHES,
    SIZE,
    STYLE,
    Panel,
    Series,
    band,
    colors,
    error_axis,
    write,
)
from metarun.reporting.run_files import RunFiles
from metarun.runs.folder import RunFolder

_MANY_VISITS = 20
_FAR = 1000.0
"""Ratio of the worst to the best curve above which the worst is cut off."""
_FAR_IN_DECADES = 1e6
"""The same on a logarithmic axis."""
_SLIDE = (9.0, 3.2)
"""Size in inches of three panels side by side, with letters that can be read on a slide."""


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
            _matrix(matrix, results),
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
            _panels({"stream": rows}, results, {"stream": Series(algo, run.color)}),
            {name: [row[name] for row in rows] for name in (rows[0] if rows else [])},
        ),
    ]


@quiet
def draw_together(folders: Mapping[str, Sequence[Path]], name: Path) -> list[Path]:
    """Write the curves of several algorithms along the same streams as PNG, SVG and CSV.

    Args:
        folders: Run folders of each algorithm, one for each seed.
        name: Path of the files without suffix.

    Returns:
        Paths of the written files.
    """
    about = RunFolder(next(iter(folders.values()))[0]).read_results()
    panel = together(folders, _looks(folders), name.name, across=True)
    streams = str(about["test"]["episodes"])
    seeds = sorted({len(runs) for runs in folders.values()})
    counts = " or ".join(map(str, seeds)) + (" seed" if seeds == [1] else " seeds")
    text = f"{about['data']}: means over {streams} test streams and {counts}, bands: 95 % intervals"
    # The user may have chosen a folder behind a link.
    with rc_context(STYLE):
        write(name.parent.resolve(), panel, text)
    return [name.with_name(f"{name.name}.{kind}") for kind in ("png", "svg", "csv")]


def _looks(names: Iterable[str]) -> dict[str, Series]:
    """Return the look of each algorithm; neighbors differ in color and dash, so both are seen."""
    listed = list(names)
    if len(listed) >= len(COLORS):
        return {name: Series(name, *look) for name, look in colors(listed).items()}
    return {n: Series(n, COLORS[at], DASHES[at % 2]) for at, n in enumerate(listed)}


@quiet
def together(
    folders: Mapping[str, Sequence[Path]],
    series: Mapping[str, Series],
    name: str,
    *,
    across: bool = False,
) -> Panel:
    """Return a figure of several learners along the same streams.

    Args:
        folders: Run folders of each learner by its key, one for each seed. Each test stream is
            averaged over the seeds before the interval is computed.
        series: Name and look of each learner, by the same keys.
        name: Name of the figure's files.
        across: Whether the panels are side by side, as on a slide.
    """
    curves: dict[str, list[dict[str, str]]] = {}
    for key, runs in folders.items():
        about = RunFolder(runs[0]).read_results()
        stream_record = [_stream_record(run) for run in runs]
        mean = {n: np.mean([one[n] for one in stream_record], axis=0) for n in stream_record[0]}
        stream = Stream.of(about["layout"])
        curves[key] = list(csv.DictReader(io.StringIO(continual_metrics.curves(mean, stream))))
    names = list(next(iter(curves.values()))[0])
    columns: dict[str, list[Any]] = {
        "run": [series[key].name for key, rows in curves.items() for _ in rows]
    }
    columns |= {n: [row[n] for rows in curves.values() for row in rows] for n in names}
    with rc_context(STYLE):
        figure = _panels(curves, about, series, across=across)
    return Panel(
        name,
        "Along the stream",
        "Metric on the current task, cumulative loss of incoming rows, and metric on all tasks "
        "seen; bands are the 95 % interval over test streams.",
        f"Three curves along the stream of each of {len(folders)} learners.",
        figure,
        columns,
        {key: series[key] for key in folders},
    )


def _matrix(matrix: Floats, results: Results) -> Figure:
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
    axes.set(xlabel="task", ylabel="visits so far")
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
    series: Mapping[str, Series],
    *,
    across: bool = False,
) -> Figure:
    """Draw three panels over the rows of the stream, with 95 % intervals over test streams."""
    scale, metric = unit(str(results["metric"]))
    metric = metric.replace("mean squared error", "squared error")
    # With many visits, a curve within each of them would merge into a block of color.
    many = len(results["layout"]["visits"]) > _MANY_VISITS
    figure = Figure(figsize=_SLIDE if across else (SIZE[0], 6.4))
    drawn = figure.subplots(1, 3) if across else figure.subplots(3, 1)
    names = ("current", "cumulative_loss", "seen")
    labels = (
        f"{metric}\non the task just learned" if many else f"{metric}\non the current task",
        "cumulative loss\nof incoming rows",
        f"{metric}\non all tasks seen",
    )
    for axes, name, label in zip(drawn, names, labels, strict=True):
        heights = []
        for key, rows in curves.items():
            ends = many and name == "current"
            here = [row for row in rows if row[name] and (row["seen"] or not ends)]
            x, y, width = _columns(here, name)
            if name != "cumulative_loss":
                y, width = scale * y, scale * width
            look = series[key]
            style: Any = {"color": look.color, "linestyle": look.dash, "linewidth": 1.5}
            axes.plot(x, y, **style, gid=f"{key}-{name}")
            if len(curves) <= len(COLORS):
                band(axes, x, y, width, look.color, f"{key}-{name}")
            heights.append(y)
        axes.set(ylabel=label, xlim=(0, None), ylim=(0, None))
        if name != "cumulative_loss":
            _scale_axis(axes, np.concatenate(heights), percent=scale > 1.0)
        # A curve that diverges would flatten the others.
        tops = [np.nanquantile(y, 0.98) for y in heights if np.isfinite(y).any()]
        positive = [top for top in tops if top > 0]
        far = _FAR if axes.get_yscale() == "linear" else _FAR_IN_DECADES
        if positive and max(positive) > far * min(positive):
            axes.set_ylim(top=far / 10 * min(positive))
    for axes in drawn if across else drawn[-1:]:
        axes.set_xlabel("rows of the stream")
    return figure


def _scale_axis(axes: Axes, values: Floats, *, percent: bool) -> None:
    """End an axis of accuracies at 100 %; an axis of errors over decades is logarithmic."""
    if percent:
        # An accuracy cannot exceed 100 %, even if its interval does.
        axes.set_ylim(top=min(axes.get_ylim()[1], 104.0))
        return
    error_axis(axes, values)
    if axes.get_yscale() == "log":
        # An interval that reaches zero would add decades without a curve.
        axes.set_ylim(bottom=0.7 * float(np.nanmin(values)))


def _columns(rows: list[dict[str, str]], name: str) -> tuple[Floats, Floats, Floats]:
    """Return the rows of the stream so far, a curve, and the half-widths of its intervals."""
    columns = [[float(row[n] or "nan") for row in rows] for n in ("rows", name, f"{name}_ci95")]
    x, y, width = (np.array(column) for column in columns)
    return x, y, width
