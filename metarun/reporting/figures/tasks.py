"""Single test tasks with a learner's predictions: a good, a median and a bad task.

The tasks are selected by the figures of the finished test. They influence no other choice.
Shapes: S support rows, Q query rows, G points of a grid, W ways, C H W images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from metarun.algorithms.base import Algorithm
from metarun.core import seeding
from metarun.core.measures import figure as shown
from metarun.core.statistics import Floats
from metarun.core.types import EpisodeSource, Prediction, TaskBatch
from metarun.evaluation.test_time_augmentation import predict
from metarun.reporting.figures.drawing import INK, MUTED, PAPER, RIGHT, SIZE, WRONG, Panel, Series
from metarun.reporting.figures.samples import mosaic, shares

_STEPS = (0, 1, 5, 10)
_FAINTEST = 0.25
_GRID = 200
_AT_ONCE = 100
_WITHIN = 1.96
_MOST_WAYS, _MOST_SHOTS, _MOST_QUERIES = 10, 3, 8


@dataclass(frozen=True)
class Learned:
    """A trained learner with its data.

    Attributes:
        algorithm: Algorithm in evaluation mode, with the best parameters on meta-val if there
            are any, else with the last ones.
        source: Data of the run.
        color: Color of the algorithm in all figures of a report.
        views: Number of views of each image over which a prediction is averaged, as in the test.
    """

    algorithm: Algorithm
    source: EpisodeSource
    color: str
    views: int = 1

    @property
    def steps(self) -> int | None:
        """Number of inner steps in the test; None for a learner without inner steps."""
        trained = getattr(self.algorithm, "inner_steps", None)
        return self.algorithm.evaluation_steps(trained) if isinstance(trained, int) else None


def panels(learned: Learned, figures: Floats) -> list[Panel]:
    """Return figures of the predictions for three test tasks; none if tasks cannot be drawn.

    Args:
        learned: The trained learner.
        figures: Metric of each test episode, (N,).
    """
    shape = learned.source.spec.input_shape
    curves = shape == (1,) and learned.source.spec.output_dim == 1
    images = len(shape) == 3 and learned.source.spec.kind == "classification"
    if not (curves or images) or learned.source.spec.streams is not None:
        return []
    draw = _fit if curves else _grid
    ranked = figures / _variances(learned, len(figures)) if curves else figures
    return [
        draw(learned, name, index, float(figures[index]))
        for name, index in chosen(ranked, higher=learned.source.spec.higher_is_better).items()
    ]


def _variances(learned: Learned, count: int) -> Floats:
    """Return the variance of the query targets of each test task, (N,)."""
    starts = range(0, count, _AT_ONCE)
    batches = [learned.source.batch("test", at, min(_AT_ONCE, count - at)) for at in starts]
    targets = torch.cat([batch.query_y.flatten(1) for batch in batches])
    return _numbers(targets.var(1).clamp_min(1e-12))


def chosen(figures: Floats, *, higher: bool) -> dict[str, int]:
    """Return the indices of the test tasks at 5, 50 and 95 % of the ranking from the best."""
    goodness = np.where(np.isfinite(figures), figures if higher else -figures, -np.inf)
    order = np.argsort(-goodness, kind="stable")
    last = len(order) - 1
    return {
        name: int(order[round(share * last)])
        for name, share in (("good", 0.05), ("median", 0.5), ("bad", 0.95))
    }


def task_of(learned: Learned, index: int) -> TaskBatch:
    """Return one test task as a batch."""
    return learned.source.batch("test", index, 1)


def answer(learned: Learned, batch: TaskBatch, query_x: Tensor, index: int) -> Prediction:
    """Predict given queries of a test task; repeated calls give the same predictions."""
    with torch.no_grad(), torch.random.fork_rng([]):
        seeding.seed_torch(seeding.key("report", "test", index))
        return predict(learned.algorithm, batch.support_x, batch.support_y, query_x, learned.views)


# Regression.


@dataclass
class _Plot:
    """A figure of y against x that records its numbers.

    Attributes:
        figure: Figure with one panel.
        series: Series that can be hidden.
        columns: All points drawn.
        sight: Values that must be visible.
    """

    figure: Figure = field(default_factory=lambda: Figure(figsize=SIZE))
    series: dict[str, Series] = field(default_factory=dict)
    columns: dict[str, list[Any]] = field(
        default_factory=lambda: {"what": [], "x": [], "y": [], "spread": []}
    )
    sight: list[Floats] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.axes = self.figure.add_subplot()

    def note(self, what: str, x: Floats, y: Floats) -> None:
        """Record the numbers of a curve or of points."""
        self.columns["what"] += [what] * len(x)
        self.columns["x"] += list(map(float, x))
        self.columns["y"] += list(map(float, y))
        self.columns["spread"] += [math.nan] * len(x)

    def line(self, key: str, what: str, series: Series, x: Floats, y: Floats, width: float) -> None:
        """Draw a curve."""
        self.series[key] = series
        (line,) = self.axes.plot(x, y, color=series.color, linewidth=width, gid=key)
        line.set(linestyle=series.dash, alpha=series.alpha)
        self.note(what, x, y)

    def points(self, key: str, what: str, x: Floats, y: Floats, marker: str, size: float) -> None:
        """Draw points."""
        self.axes.scatter(
            x, y, s=size, color=INK, edgecolors=PAPER, zorder=4, marker=marker, gid=f"{key}-points"
        )
        self.note(what, x, y)
        self.sight.append(y)

    def finish(self) -> None:
        """Limit the axis to the values that must be visible, with a margin."""
        values = np.concatenate(self.sight)
        values = values[np.isfinite(values)]
        low, high = float(values.min()), float(values.max())
        rim = 0.2 * (high - low) or 1.0
        bottom, top = self.axes.get_ylim()
        self.axes.set_ylim(max(bottom, low - rim), min(top, high + rim))
        self.axes.set(xlabel="x", ylabel="y")


def _fit(learned: Learned, name: str, index: int, figure: float) -> Panel:
    """Return a figure of a task's function, its support and the predictions."""
    batch = task_of(learned, index)
    low, high = _range(learned.source, batch)
    grid = torch.linspace(low, high, _GRID, dtype=batch.support_x.dtype)
    grid = grid.to(batch.support_x.device)[None, :, None]
    plot = _Plot()
    _draw_truth(plot, learned.source, batch, grid, index)
    spread = _draw_answers(plot, learned, batch, grid, index)
    support = _numbers(batch.support_x[0, :, 0]), _numbers(batch.support_y[0, :, 0])
    plot.points("support", "support", *support, "^", 90.0)
    plot.series["support"] = Series("support", INK, marker="^")
    plot.finish()
    after = "" if learned.steps is None else f" after {learned.steps} inner steps (thick line)"
    summary = f"Test task {index}: mean squared error on its queries {shown('mse', figure)}{after}."
    more = " The band is the predictive 95 % interval." if spread else ""
    return Panel(
        f"fit-{name}",
        f"A {name} task",
        f"{summary} Triangles are the {batch.support_x.shape[1]} support points.{more}",
        f"{summary} Predictions on a grid, and the function.",
        plot.figure,
        plot.columns,
        plot.series,
    )


def _draw_truth(
    plot: _Plot, source: EpisodeSource, batch: TaskBatch, grid: Tensor, index: int
) -> None:
    """Draw the queries, and the function if it is known."""
    truth = getattr(source, "truth", None)
    if truth is not None:
        values = _numbers(truth("test", index, grid[0])[:, 0])
        line = Series("the function", INK)
        plot.line("truth", "function", line, _numbers(grid[0, :, 0]), values, 1.2)
        plot.sight.append(values)
    queries = _numbers(batch.query_x[0, :, 0]), _numbers(batch.query_y[0, :, 0])
    plot.points("queries", "query", *queries, "o", 20.0)
    plot.series["queries"] = Series("queries", INK, marker="o")


def _draw_answers(
    plot: _Plot, learned: Learned, batch: TaskBatch, grid: Tensor, index: int
) -> bool:
    """Draw the predictions, after several numbers of inner steps if the learner has any.

    Returns:
        Whether a predictive band was drawn.
    """
    x = _numbers(grid[0, :, 0])
    steps = learned.steps if learned.steps is not None else max(_STEPS)
    with torch.no_grad():
        traced = learned.algorithm.trace(
            batch.support_x, batch.support_y, grid, max(steps, *_STEPS)
        )
    if traced is not None:
        every = sorted({steps, *_STEPS})
        # Shades of one color, the darker the more steps.
        for step, alpha in zip(every, np.linspace(_FAINTEST, 1.0, len(every)), strict=True):
            name = f"{step} step{'s' * (step != 1)}"
            tested = step == steps
            line = Series(name, learned.color, alpha=float(alpha))
            values = _numbers(traced[step, 0, :, 0])
            plot.line(f"after{step}", name, line, x, values, 2.4 if tested else 1.4)
            # Predictions after other numbers of steps may leave the visible range.
            plot.sight += [values] if tested else []
        return False
    found = answer(learned, batch, grid, index)
    values = _numbers(found.outputs[0, :, 0])
    spread = None if found.spread is None else _numbers(found.spread[0, :, 0])
    name = "answer" if spread is None else "mean and 95 % band"
    plot.line("mean", name, Series(name, learned.color), x, values, 2.0)
    plot.sight.append(values)
    if spread is None:
        return False
    plot.columns["spread"][-len(x) :] = list(map(float, spread))
    ends = values - _WITHIN * spread, values + _WITHIN * spread
    band = plot.axes.fill_between(x, *ends, color=learned.color, alpha=0.2, linewidth=0)
    band.set_gid("mean-band")
    plot.sight += ends
    return True


def _range(source: EpisodeSource, batch: TaskBatch) -> tuple[float, float]:
    ends: tuple[float, float] | None = getattr(source, "inputs", None)
    both = torch.cat([batch.support_x, batch.query_x], 1)
    return ends or (float(both.min()), float(both.max()))


# Images.


def _grid(learned: Learned, name: str, index: int, figure: float) -> Panel:
    """Return a figure of a task's support and queries, one row for each class.

    Wrong predictions are marked.
    """
    batch = task_of(learned, index)
    found = answer(learned, batch, batch.query_x, index).outputs[0].argmax(-1).tolist()
    labels = batch.query_y[0].tolist()
    ways = int(batch.support_y.max()) + 1
    names, rows = _names(learned.source, batch, ways), min(ways, _MOST_WAYS)
    drawing = _pictures(batch, rows)
    plotted = Figure(figsize=(0.46 * drawing.grid.shape[1] + 0.6, 0.46 * rows + 0.3))
    marks = [
        (row, drawing.shots + column, found[place], found[place] == labels[place])
        for row, places in enumerate(drawing.queries)
        for column, place in enumerate(places)
    ]
    _draw_grid(plotted.add_subplot(), drawing.grid, marks, drawing.shots)
    summary = f"Test task {index}: {shown('accuracy', figure)} of its queries classified correctly."
    legend = "; ".join(f"{letter(way)} {names[way]}" for way in range(rows))
    some = "" if rows == ways else f" The first {rows} of {ways} classes are shown."
    return Panel(
        f"task-{name}",
        f"A {name} task",
        f"{summary} The support is left of the line, queries of the same class are right of it. "
        "Blue frames mark correct predictions. Wrong ones are crossed out in orange, with the "
        f"letter of the predicted class. {legend}.{some}",
        f"{summary} A row of images for each of {rows} classes.",
        plotted,
        {
            "query": list(range(len(labels))),
            "class": [names[label] for label in labels],
            "answer": [names[label] for label in found],
            "right": [one == other for one, other in zip(found, labels, strict=True)],
        },
    )


@dataclass(frozen=True)
class _Pictures:
    """Images of a task, one row for each class: part of its support, then of its queries.

    Attributes:
        grid: (rows, shots + queries, C, H, W) in [0, 1]; empty cells are gray.
        shots: Number of columns of the support.
        queries: Indices of the queries shown in each row.
    """

    grid: Floats
    shots: int
    queries: list[list[int]]


def _pictures(batch: TaskBatch, rows: int) -> _Pictures:
    every = _numbers(torch.cat([batch.support_x[0], batch.query_x[0]]))[None]
    images = shares(every, every)[0]
    support = [_of(batch.support_y, way)[:_MOST_SHOTS] for way in range(rows)]
    queries = [_of(batch.query_y, way)[:_MOST_QUERIES] for way in range(rows)]
    shots, asked = (max(map(len, places)) for places in (support, queries))
    grid = np.full((rows, shots + asked, *images.shape[1:]), 0.5)
    first = batch.support_y.shape[1]
    for row in range(rows):
        grid[row, : len(support[row])] = images[support[row]]
        there = [first + place for place in queries[row]]
        grid[row, shots : shots + len(there)] = images[there]
    return _Pictures(grid, shots, queries)


def _of(labels: Tensor, way: int) -> list[int]:
    """Return the indices of the rows with a class, given labels (1, R)."""
    found: list[int] = (labels[0] == way).nonzero()[:, 0].tolist()
    return found


def _draw_grid(
    axes: Axes, grid: Floats, marks: list[tuple[int, int, int, bool]], shots: int
) -> None:
    rows, _, _, height, width = grid.shape
    high, wide = height + 2, width + 2
    axes.imshow(mosaic(grid), interpolation="nearest")
    for row, column, said, right in marks:
        color = RIGHT if right else WRONG
        corner = (column * wide - 0.5, row * high - 0.5)
        # The frame is inside its cell, so that no neighbor covers it.
        inside = (corner[0] + 0.8, corner[1] + 0.8)
        frame = Rectangle(
            inside, wide - 1.6, high - 1.6, fill=False, edgecolor=color, linewidth=1.4
        )
        axes.add_patch(frame)
        if not right:
            ends = (corner[0], corner[0] + wide), (corner[1], corner[1] + high)
            axes.plot(*ends, color=color, linewidth=1.0)
            axes.annotate(
                letter(said),
                (corner[0] + wide - 1, corner[1] + 1),
                ha="right",
                va="top",
                fontsize=7,
                fontweight="bold",
                color="white",
                bbox={"facecolor": color, "edgecolor": "none", "pad": 1.0},
            )
    axes.axvline(shots * wide - 0.5, color=MUTED, linewidth=3.0)
    axes.set_xlim(-0.5, grid.shape[1] * wide - 0.5)
    axes.set_yticks([row * high + high / 2 for row in range(rows)], list(map(letter, range(rows))))
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _names(source: EpisodeSource, batch: TaskBatch, ways: int) -> list[str]:
    names = getattr(source, "class_names", None)
    if names is None or batch.class_ids is None:
        return [f"class {letter(way)}" for way in range(ways)]
    every: Sequence[str] = names("test")
    return [every[int(number)] for number in batch.class_ids[0]]


def letter(way: int) -> str:
    """Return a short name for a class of a task: a letter, or a number from the 27th on."""
    return chr(ord("A") + way) if way < 26 else str(way + 1)


def _numbers(values: Tensor) -> Floats:
    return np.asarray(values.detach().cpu().numpy(), dtype=np.float64)
