"""Tables that compare algorithms on a data set or along streams."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from metarun.core.console import duration
from metarun.core.measures import Measure
from metarun.core.results import measures_of
from metarun.core.statistics import Floats, quiet
from metarun.evaluation import continual_metrics
from metarun.reporting.results import (
    Result,
    figure_of,
    measure_figure,
    measures_on_request,
    over_seeds,
)
from metarun.reporting.tables import Figure, Line, Table, shown


@dataclass(frozen=True)
class Row:
    """A row of a comparison: one algorithm.

    Attributes:
        name: Name of the algorithm, as typed on the command line.
        method: Short description of the method.
        cells: Finished runs of each column (a task size), one run for each seed.
        failed: Number of failed runs of each column; empty if there are none.
    """

    name: str
    method: str
    cells: Sequence[Sequence[Result]]
    failed: Sequence[int] = ()


def comparison(rows: Sequence[Row], columns: Sequence[str], measures: Sequence[str] = ()) -> Table:
    """Return a table of rows, sorted by the first column with the best on top.

    Names to be typed are marked as code, as in Markdown.

    Args:
        rows: One row for each algorithm.
        columns: Names of the task sizes.
        measures: Names of measures to show besides those that are shown by default.

    Raises:
        ValueError: No run has a measure of this name.
    """
    results = [result for row in rows for cell in row.cells for result in cell]
    regression = any(result.record["metric"] == "mse" for result in results)
    title = "MSE" if regression else "accuracy, %"
    # The metric is known only from a finished run.
    named = [f"{name}: {title}" if results else name for name in columns]
    heads = ["`algo=`", "method", *named]
    asked = measures_on_request(results, measures)
    every = {m.name: m for result in results for m, _ in measures_of(result.record)}
    extra = [m for m in every.values() if m.by_default or m in asked]
    heads += [measure.head for measure in extra]
    heads += ["before training", "tasks", "training", "parameters", "batch norm"]
    ordered = sorted(rows, key=lambda row: _order(row, regression))
    return _table(heads, [_cells(row, extra) for row in ordered], _note(rows, "episodes"))


STREAM_HEADS = {
    "anytime": "anytime",
    "cumulative_loss": "cumulative loss",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "forgetting": "forgetting",
    "rows_to_proficiency": "rows to proficiency",
    "rows_to_proficiency_new": "of new tasks",
    "rows_to_proficiency_returning": "of returning tasks",
}
"""Table heads for the figures of `continual_metrics.summary`; accuracies are shown in percent."""

_NOT_METRICS = ("cumulative_loss", "rows_to")


@quiet
def stream_comparison(
    rows: Sequence[Row],
    against: Row | None = None,
    measures: Sequence[str] = (),
    title: str = "",
) -> Table:
    """Return a table of learners along the same streams, best final figure first.

    Args:
        rows: One row for each algorithm, with a single cell that holds the runs of its seeds.
        against: Comparator for regret, run with the same seeds as the others.
        measures: Names of measures to show.
        title: Title of the table.

    Raises:
        ValueError: No run has a measure of this name.
    """
    results = [result for row in rows for cell in row.cells for result in cell]
    regression = any(result.record["metric"] == "mse" for result in results)
    shown_figures = [n for n in STREAM_HEADS if any(n in result.figures for result in results)]
    metric = "MSE" if regression else "accuracy, %"
    # The metric is known only from a finished run.
    heads = ["`algo=`", "method", f"{metric}, at the end" if results else "at the end"]
    heads += [STREAM_HEADS[name] for name in shown_figures]
    extra = measures_on_request(results, measures)
    heads += [measure.head for measure in extra]
    if against is not None:
        heads += [f"regret against `{against.name}`", "grows as rows to the power"]
    heads += ["training", "parameters"]
    ordered = sorted(rows, key=lambda row: _order(row, regression))
    lines = [_stream_cells(row, shown_figures, extra, against) for row in ordered]
    return _table(heads, lines, _note(rows, "streams"), title)


def without_marks(table: Table) -> Table:
    """Return a table without the marks of code, for other formats than Markdown."""

    def plain(cell: str | Figure) -> str | Figure:
        return cell.replace("`", "") if isinstance(cell, str) else cell

    lines = [
        {head.replace("`", "").removesuffix("="): plain(cell) for head, cell in line.items()}
        for line in table.lines
    ]
    return Table(table.title, lines, table.text)


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str | Figure]], note: str, title: str = ""
) -> Table:
    lines: list[Line] = [dict(zip(heads, row, strict=True)) for row in rows]
    return Table(title, lines, note)


def _stream_cells(
    row: Row, names: Sequence[str], extra: Sequence[Measure], against: Row | None
) -> list[str | Figure]:
    cell = row.cells[0]
    cells: list[str | Figure] = [f"`{row.name}`", row.method, *_figures(row)]
    if not cell:
        return [*cells, *[""] * (len(names) + len(extra) + (2 if against else 0) + 2)]
    percent = 100.0 if cell[0].record["metric"] == "accuracy" else 1.0
    for name in names:
        scale = 1.0 if name.startswith(_NOT_METRICS) else percent
        values = [scale * result.figures[name] for result in cell if name in result.figures]
        places = 1 if scale != 1.0 or name.startswith("rows_to") else None
        cells.append(over_seeds(values, places) if values else "")
    cells += [measure_figure(cell, measure) for measure in extra]
    if against is not None:
        cells += _regret_cells(row, against)
    seconds = _mean([result.record["train_seconds"] for result in cell], duration)
    return [*cells, seconds, f"{cell[0].record['parameters']:,}"]


def _regret_cells(row: Row, against: Row) -> list[str | Figure]:
    """Return the final regret and its growth exponent, or the reason why there is none.

    Raises:
        ValueError: The two learners were run along different streams.
    """
    if row.name == against.name:
        return ["–", "–"]
    comparators = {result.record["seed"]: result for result in against.cells[0]}
    curves: list[Floats] = []
    for result in row.cells[0]:
        seed = result.record["seed"]
        if seed not in comparators:
            return [f"no `{against.name}` with seed {seed}", "–"]
        other = comparators[seed]
        if result.record["episodes_hash"] != other.record["episodes_hash"]:
            raise ValueError(
                f"algo={against.name} was run along other streams than algo={row.name}: "
                "regret needs the same streams"
            )
        assert result.losses is not None
        assert other.losses is not None
        assert result.stream is not None
        curves.append(continual_metrics.regret(result.losses, other.losses, result.stream))
    ends = over_seeds([curve[:, -1] for curve in curves])
    powers = np.concatenate([continual_metrics.growth(curve) for curve in curves])
    growing = np.isfinite(powers)
    if not growing.any():
        return [ends, "–"]
    # Streams without regret have no exponent, so the mark counts those that have one.
    mark = "" if growing.all() else f"{growing.sum()} of {len(powers)} streams"
    return [ends, replace(over_seeds([powers[growing]]), mark=mark)]


def _cells(row: Row, extra: Sequence[Measure]) -> list[str | Figure]:
    results = [result for cell in row.cells for result in cell]
    figures = _figures(row)
    if not results:
        return [f"`{row.name}`", row.method, *figures, *[""] * (len(extra) + 5)]
    record = results[0].record
    seconds = [_mean([r.record["train_seconds"] for r in cell], duration) for cell in row.cells]
    return [
        f"`{row.name}`",
        row.method,
        *figures,
        *(_side_by_side([measure_figure(cell, one) for cell in row.cells]) for one in extra),
        " / ".join(_untrained(cell) for cell in row.cells),
        f"{record['steps'] * record['tasks_per_step']:,}",
        " / ".join(seconds),
        f"{record['parameters']:,}",
        record["bn_statistics"],
    ]


def _side_by_side(figures: Sequence[str | Figure]) -> str | Figure:
    """Return the figures of all columns in one cell."""
    return figures[0] if len(figures) == 1 else " / ".join(map(str, figures))


def _figures(row: Row) -> list[str | Figure]:
    """Return for each column the figure with the number of failed seeds, or why there is none."""
    shown_figures: list[str | Figure] = []
    for cell, failed in zip(row.cells, row.failed or [0] * len(row.cells), strict=True):
        if not cell:
            shown_figures.append("failed" if failed else "not run")
        else:
            mark = f"{failed} failed" if failed else ""
            shown_figures.append(replace(figure_of(cell), mark=mark))
    return shown_figures


def _untrained(cell: Sequence[Result]) -> str:
    found = [result.untrained for result in cell if result.untrained is not None]
    accuracy = bool(cell) and cell[0].record["metric"] == "accuracy"
    return _mean(found, lambda mean: str(shown(mean, accuracy=accuracy)))


def _mean(values: Sequence[float], show: Any) -> str:
    return show(float(np.mean(values))) if values else "–"


def _order(row: Row, regression: bool) -> float:
    """Return a sort key: best first; runs that diverged and missing runs last."""
    means = [float(result.episodes.mean()) for result in row.cells[0]]
    if not means or not np.isfinite(means).all():
        return math.inf
    mean = float(np.mean(means))
    return mean if regression else -mean


def _note(rows: Sequence[Row], units: str) -> str:
    """Return how many episodes or streams and seeds stand behind the figures, if any."""
    cells = [cell for row in rows for cell in row.cells if cell]
    counts = sorted({len(result.episodes) for cell in cells for result in cell})
    seeds = sorted({len(cell) for cell in cells})
    if not cells:
        return ""
    note = f"{_either(counts)} test {units}; mean ± 95 % interval over {units}; {_either(seeds)} "
    if seeds == [1]:
        return f"{note}seed."
    return f"{note}seeds, with the interval over several seeds in brackets."


def _either(counts: Sequence[int]) -> str:
    return " or ".join(map(str, counts))
