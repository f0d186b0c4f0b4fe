"""Single test tasks, and what a learner makes of them: a good one, the median, a bad one.

The tasks are chosen by the figures of the test that is over; nothing is chosen by them.
Shapes: S support rows, Q query rows, G points of a grid, W ways, C H W images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from metarun import seeding
from metarun.algorithms.base import Algorithm
from metarun.intervals import Floats
from metarun.report.drawing import (
    DASHES,
    INK,
    MUTED,
    PAPER,
    RIGHT,
    SIZE,
    WRONG,
    Panel,
    Series,
)
from metarun.report.samples import mosaic, shares
from metarun.screen import figure as shown
from metarun.types import EpisodeSource, Prediction, TaskBatch

_STEPS = (0, 1, 5, 10)
_GRID = 200
_WITHIN = 1.96
_MOST_WAYS, _MOST_SHOTS, _MOST_QUERIES = 10, 3, 8


@dataclass(frozen=True)
class Learned:
    """What a run has learned, ready to answer.

    Attributes:
        algorithm: With its best parameters by meta-val, else its last; in evaluation.
        source: Its data.
        colour: Of its algorithm, in every figure of a report.
    """

    algorithm: Algorithm
    source: EpisodeSource
    colour: str


def panels(learned: Learned, figures: Floats) -> list[Panel]:
    """What is made of three test tasks; none where a task cannot be drawn.

    Args:
        learned: Who answers.
        figures: (N,) the metric of each test episode.
    """
    shape = learned.source.spec.input_shape
    curves = shape == (1,) and learned.source.spec.output_dim == 1
    images = len(shape) == 3 and learned.source.spec.kind == "classification"
    if not (curves or images) or learned.source.spec.streams is not None:
        return []
    draw = _fit if curves else _grid
    return [
        draw(learned, name, index, float(figures[index]))
        for name, index in chosen(figures, higher=learned.source.spec.higher_is_better).items()
    ]


def chosen(figures: Floats, *, higher: bool) -> dict[str, int]:
    """The numbers of a good, a median and a bad test task: at 5, 50 and 95 % from the best."""
    goodness = np.where(np.isfinite(figures), figures if higher else -figures, -np.inf)
    order = np.argsort(-goodness, kind="stable")
    last = len(order) - 1
    return {
        name: int(order[round(share * last)])
        for name, share in (("good", 0.05), ("median", 0.5), ("bad", 0.95))
    }


def task_of(learned: Learned, index: int) -> TaskBatch:
    """One test task."""
    return learned.source.batch("test", index, 1)


def answer(learned: Learned, batch: TaskBatch, query_x: Tensor, index: int) -> Prediction:
    """Answers to other queries of a test task; the same each time."""
    with torch.no_grad(), torch.random.fork_rng([]):
        torch.manual_seed(seeding.key("report", "test", index))
        return learned.algorithm.predict(batch.support_x, batch.support_y, query_x)


# Regression.


def _fit(learned: Learned, name: str, index: int, figure: float) -> Panel:
    """A task's function, its support, and the answers after some inner steps."""
    batch = task_of(learned, index)
    low, high = _range(learned.source, batch)
    grid = torch.linspace(low, high, _GRID, dtype=batch.support_x.dtype)
    grid = grid.to(batch.support_x.device)[None, :, None]
    drawing = Figure(figsize=SIZE)
    axes = drawing.add_subplot()
    columns: dict[str, list[Any]] = {"what": [], "x": [], "y": [], "spread": []}
    series = {"truth": Series("the function", INK), "support": Series("support", INK, "")}
    x = _numbers(grid[0, :, 0])
    truth = getattr(learned.source, "truth", None)
    if truth is not None:
        values = _numbers(truth("test", index, grid[0])[:, 0])
        axes.plot(x, values, color=INK, linewidth=1.2, gid="truth")
        _note(columns, "function", x, values)
    else:
        series["truth"] = Series("queries", INK, "")
    at, values = _numbers(batch.query_x[0, :, 0]), _numbers(batch.query_y[0, :, 0])
    size = 10 if truth is None else 0
    axes.scatter(at, values, s=size, color=INK, gid="truth-queries")
    _note(columns, "query", at, values)
    for key, (line, curve, spread) in _answers(learned, batch, grid, index).items():
        series[key] = line
        width = 2.0 if line.dash == "-" else 1.1
        axes.plot(x, curve, color=line.colour, linestyle=line.dash, linewidth=width, gid=key)
        if spread is not None:
            ends = curve - _WITHIN * spread, curve + _WITHIN * spread
            shade = axes.fill_between(x, *ends, color=line.colour, alpha=0.2, linewidth=0)
            shade.set_gid(f"{key}-band")
        _note(columns, line.name, x, curve, spread)
    at, values = _numbers(batch.support_x[0, :, 0]), _numbers(batch.support_y[0, :, 0])
    axes.scatter(at, values, s=34, color=INK, edgecolors=PAPER, zorder=3, marker="^", gid="support")
    _note(columns, "support", at, values)
    # What was answered before the last step need not be in sight to its ends.
    earlier = [line.name for line in series.values() if line.dash not in ("-", "")]
    _room(axes, np.array(columns["y"])[[what not in earlier for what in columns["what"]]])
    axes.set(xlabel="x", ylabel="y")
    banded = any(key.startswith("mean") for key in series)
    told = f"Test task {index}: mean squared error {shown('mse', figure)}."
    more = " The band holds 95 % of what it expects." if banded else ""
    return Panel(
        f"fit-{name}",
        f"A {name} task",
        f"{told} Triangles are the {batch.support_x.shape[1]} support points.{more}",
        f"{told} The answers on a grid against the function.",
        drawing,
        columns,
        series,
    )


def _range(source: EpisodeSource, batch: TaskBatch) -> tuple[float, float]:
    ends: tuple[float, float] | None = getattr(source, "inputs", None)
    both = torch.cat([batch.support_x, batch.query_x], 1)
    return ends or (float(both.min()), float(both.max()))


def _answers(
    learned: Learned, batch: TaskBatch, grid: Tensor, index: int
) -> dict[str, tuple[Series, Floats, Floats | None]]:
    """What to call them, the answers (G,) and their spread: after inner steps where there are."""
    with torch.no_grad():
        traced = learned.algorithm.trace(batch.support_x, batch.support_y, grid, max(_STEPS))
    if traced is not None:
        return {
            f"after{steps}": (
                Series(f"{steps} step{'s' * (steps != 1)}", learned.colour, DASHES[3 - place]),
                _numbers(traced[steps, 0, :, 0]),
                None,
            )
            for place, steps in enumerate(_STEPS)
        }
    found = answer(learned, batch, grid, index)
    spread = None if found.spread is None else _numbers(found.spread[0, :, 0])
    name = "answer" if spread is None else "mean and 95 % band"
    return {"mean": (Series(name, learned.colour), _numbers(found.outputs[0, :, 0]), spread)}


def _note(
    columns: dict[str, list[Any]], what: str, x: Floats, y: Floats, spread: Floats | None = None
) -> None:
    columns["what"] += [what] * len(x)
    columns["x"] += list(map(float, x))
    columns["y"] += list(map(float, y))
    columns["spread"] += [float("nan")] * len(x) if spread is None else list(map(float, spread))


def _room(axes: Axes, values: Floats) -> None:
    """Show these values and a rim, and no more."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    rim = 0.2 * (high - low) or 1.0
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, low - rim), min(top, high + rim))


# Images.


def _grid(learned: Learned, name: str, index: int, figure: float) -> Panel:
    """A task's support and queries, a row for each class, with the answers that are wrong."""
    batch = task_of(learned, index)
    found = answer(learned, batch, batch.query_x, index).outputs[0].argmax(-1).cpu()
    support_y, query_y = batch.support_y[0].cpu(), batch.query_y[0].cpu()
    ways = int(support_y.max()) + 1
    rows = min(ways, _MOST_WAYS)
    images = _pictures(batch)
    blank = np.full_like(images[0], 0.5)
    names = _names(learned.source, batch, ways)
    shots = min(_MOST_SHOTS, int((support_y == 0).sum()))
    asked = min(_MOST_QUERIES, max(int((query_y == way).sum()) for way in range(rows)))
    cells: list[Floats] = []
    marks: list[tuple[int, int, int, bool]] = []
    columns: dict[str, list[Any]] = {"query": [], "class": [], "answer": [], "right": []}
    for way in range(rows):
        own = (support_y == way).nonzero()[:shots, 0].tolist()
        mine = (query_y == way).nonzero()[:, 0].tolist()
        cells += [images[place] for place in own] + [blank] * (shots - len(own))
        few = mine[:asked]
        cells += [images[len(support_y) + place] for place in few] + [blank] * (asked - len(few))
        for column, place in enumerate(few):
            marks.append((way, shots + column, int(found[place]), int(found[place]) == way))
        for place in mine:
            columns["query"].append(place)
            columns["class"].append(names[way])
            columns["answer"].append(names[int(found[place])])
            columns["right"].append(int(found[place]) == way)
    grid = np.stack(cells).reshape(rows, shots + asked, *images.shape[1:])
    drawing = Figure(figsize=(0.42 * (shots + asked) + 0.9, 0.5 * rows + 0.7))
    axes = drawing.add_subplot()
    _draw_grid(axes, grid, marks, shots)
    right = sum(columns["right"])
    told = f"Test task {index}: {shown('accuracy', figure)} of its queries answered right."
    legend = "; ".join(f"{_letter(way)} {names[way]}" for way in range(rows))
    some = "" if rows == ways else f" The first {rows} of {ways} classes are shown."
    return Panel(
        f"task-{name}",
        f"A {name} task",
        f"{told} Left of the line the support, right of it queries of the same class: framed in "
        "blue where the answer is right, crossed in orange with the letter of the answer where "
        f"it is wrong. {legend}.{some}",
        f"{told} {right} of {len(columns['right'])} shown classes' queries are right.",
        drawing,
        columns,
    )


def _draw_grid(
    axes: Axes, grid: Floats, marks: list[tuple[int, int, int, bool]], shots: int
) -> None:
    from matplotlib.patches import Rectangle

    rows, _, _, height, width = grid.shape
    high, wide = height + 2, width + 2
    axes.imshow(mosaic(grid), interpolation="nearest")
    for row, column, said, right in marks:
        colour = RIGHT if right else WRONG
        corner = (column * wide - 0.5, row * high - 0.5)
        frame = Rectangle(corner, wide, high, fill=False, edgecolor=colour, linewidth=1.6)
        axes.add_patch(frame)
        if not right:
            ends = (corner[0], corner[0] + wide), (corner[1], corner[1] + high)
            axes.plot(*ends, color=colour, linewidth=1.0)
            axes.annotate(
                _letter(said),
                (corner[0] + wide - 1, corner[1] + 1),
                ha="right",
                va="top",
                fontsize=7,
                fontweight="bold",
                color="white",
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.0},
            )
    axes.axvline(shots * wide - 0.5, color=MUTED, linewidth=3.0)
    axes.set_xlim(-0.5, grid.shape[1] * wide - 0.5)
    axes.set_yticks([row * high + high / 2 for row in range(rows)], list(map(_letter, range(rows))))
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _pictures(batch: TaskBatch) -> Floats:
    """(S + Q, C, H, W) support and query images of a task, each channel from 0 to 1."""
    rows = torch.cat([batch.support_x[0], batch.query_x[0]])
    numbers = _numbers(rows)[None]
    pictures: Floats = shares(numbers, numbers)[0]
    return pictures


def _names(source: EpisodeSource, batch: TaskBatch, ways: int) -> list[str]:
    names = getattr(source, "class_names", None)
    if names is None or batch.class_ids is None:
        return [f"class {_letter(way)}" for way in range(ways)]
    every: Mapping[int, str] = dict(enumerate(names("test")))
    return [every[int(number)] for number in batch.class_ids[0]]


def _letter(way: int) -> str:
    return chr(ord("A") + way) if way < 26 else str(way + 1)


def _numbers(values: Tensor) -> Floats:
    return np.asarray(values.detach().cpu().numpy(), dtype=np.float64)
