"""Tables of what runs have reached.

Every figure is a mean over test episodes with its 95 % interval; over several seeds the episodes
are averaged first, and the interval over the seeds stands apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metarun.evaluate import Floats, interval
from metarun.runs import RunFolder
from metarun.screen import duration

UNTRAINED = "untrained.json"
"""What a run's learner reaches before any training, on the same test episodes."""


@dataclass(frozen=True)
class Result:
    """What one finished run has reached.

    Attributes:
        record: Its `results.json`.
        episodes: (N,) the metric of each test episode.
        untrained: The mean with the initial parameters; None where it was not measured.
    """

    record: Mapping[str, Any]
    episodes: Floats
    untrained: float | None


@dataclass(frozen=True)
class Row:
    """A row of a comparison: one algorithm.

    Attributes:
        name: As it is typed.
        method: What it is, in a few words.
        cells: For each column (a size of task) the finished runs, one for each seed.
    """

    name: str
    method: str
    cells: Sequence[Sequence[Result]]


def read_result(run: RunFolder) -> Result | None:
    """The result of a run; None while it has none.

    Raises:
        ValueError: A file of the run is damaged.
    """
    if not run.has("results.json") or run.status().get("state") != "finished":
        return None
    record = run.read_json("results.json")
    with np.load(run.path / "episodes.npz") as arrays:
        episodes = np.asarray(arrays[record["metric"]], dtype=np.float64)
    untrained = run.read_json(UNTRAINED)["mean"] if run.has(UNTRAINED) else None
    return Result(record, episodes, untrained)


def comparison(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as a table in Markdown, the best of the first column first.

    Args:
        rows: One for each algorithm.
        columns: Names of the sizes.
    """
    results = [result for row in rows for cell in row.cells for result in cell]
    regression = any(result.record["metric"] == "mse" for result in results)
    title = "MSE" if regression else "accuracy, %"
    heads = ["`algo=`", "method", *(f"{name}: {title}" for name in columns)]
    heads += ["before training", "tasks", "training", "parameters", "batch norm"]
    ordered = sorted(rows, key=lambda row: _order(row, regression))
    counts = sorted({len(result.episodes) for result in results})
    seeds = sorted({len(cell) for row in rows for cell in row.cells if cell})
    note = (
        f"{_either(counts)} test episodes; mean ± 95 % interval over episodes; {_either(seeds)} "
        "seed(s), with the interval over seeds in brackets where there are several."
    )
    lines = [_line(heads), _line(["---"] * len(heads)), *(_line(_cells(row)) for row in ordered)]
    return "\n".join([*lines, "", note] if results else lines)


def _cells(row: Row) -> list[str]:
    results = [result for cell in row.cells for result in cell]
    figures = [_figure(cell) for cell in row.cells]
    if not results:
        return [f"`{row.name}`", row.method, *figures, "", "", "", "", ""]
    record = results[0].record
    seconds = [_mean([r.record["train_seconds"] for r in cell], duration) for cell in row.cells]
    return [
        f"`{row.name}`",
        row.method,
        *figures,
        " / ".join(_untrained(cell) for cell in row.cells),
        f"{record['steps'] * record['tasks_per_step']:,}",
        " / ".join(seconds),
        f"{record['parameters']:,}",
        record["bn_statistics"],
    ]


def _figure(cell: Sequence[Result]) -> str:
    """`93.4 ± 0.5`, with `(± 0.7 over 3 seeds)` behind it where there are several."""
    if not cell:
        return "not run"
    metric = cell[0].record["metric"]
    mean, ci95 = interval(np.mean([result.episodes for result in cell], axis=0))
    text = f"{_number(metric, mean)} ± {_number(metric, ci95, mean)}"
    if len(cell) == 1:
        return text
    spread = interval([result.episodes.mean() for result in cell])[1]
    return f"{text} (± {_number(metric, spread, mean)} over {len(cell)} seeds)"


def _untrained(cell: Sequence[Result]) -> str:
    metric = cell[0].record["metric"] if cell else ""
    found = [result.untrained for result in cell if result.untrained is not None]
    return _mean(found, lambda mean: _number(metric, mean))


def _mean(values: Sequence[float], show: Any) -> str:
    return show(float(np.mean(values))) if values else "–"


def _number(metric: str, value: float, beside: float | None = None) -> str:
    """An accuracy in percent; an error with two digits or more, as many as the figure beside it."""
    if metric == "accuracy":
        return f"{100 * value:.1f}"
    size = abs(value if beside is None else beside)
    places = 2 if size >= 0.1 or size == 0.0 else 1 - math.floor(math.log10(size))
    return f"{value:.{places}f}"


def _order(row: Row, regression: bool) -> float:
    """Best first; what was not run last."""
    if not row.cells[0]:
        return math.inf
    mean = float(np.mean([result.episodes.mean() for result in row.cells[0]]))
    return mean if regression else -mean


def _either(counts: Sequence[int]) -> str:
    return " or ".join(map(str, counts))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
