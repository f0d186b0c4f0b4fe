"""Tables of what runs have reached.

Every figure is a mean over test episodes with its 95 % interval; over several seeds the episodes
are averaged first, and the interval over the seeds stands apart.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from metarun.core.console import duration
from metarun.core.statistics import Floats, interval, quiet
from metarun.evaluation import continual_metrics
from metarun.runs.folder import RunFolder

if TYPE_CHECKING:
    from metarun.core.types import Stream

UNTRAINED = "untrained.json"
"""What a run's learner reaches before any training, on the same test episodes."""

BESIDE = {"log_likelihood": "log-likelihood", "coverage": "within the 95 % band, %"}
"""What a record has beside the metric, and what it is called in a table."""

Style = Literal["terminal", "markdown", "csv", "latex"]


@dataclass(frozen=True)
class Figure:
    """A mean with its 95 % intervals, in the unit in which it is shown.

    Attributes:
        mean: Over test episodes; over several seeds the episodes are averaged first.
        ci95: Half-width of the interval over episodes; None or not a number where there is none.
        episodes: Their number; 0 where it is not known.
        seeds: Number of runs.
        seeds_ci95: Half-width of the interval over the seeds, where there are several.
        places: Digits behind the point; None takes two digits or more of an error.
        mark: A remark behind it.
    """

    mean: float
    ci95: float | None = None
    episodes: int = 0
    seeds: int = 1
    seeds_ci95: float | None = None
    places: int | None = None
    mark: str = ""

    def __str__(self) -> str:
        """`93.4 ± 0.5`, with `(± 0.7 over 3 seeds)` behind it where there are several.

        A run that diverged has no number to show.
        """
        if not math.isfinite(self.mean):
            return f"not finite ({self.mark})" if self.mark else "not finite"
        text = self._number(self.mean)
        if self.ci95 is not None and not math.isnan(self.ci95):
            text += f" ± {self._number(self.ci95)}"
        if self.seeds_ci95 is not None:
            text += f" (± {self._number(self.seeds_ci95)} over {self.seeds} seeds)"
        return f"{text} ({self.mark})" if self.mark else text

    def meets(self, other: Figure) -> bool:
        """Whether the intervals overlap; a figure without one is a point."""
        widths = [w for w in (self.ci95, other.ci95) if w is not None and not math.isnan(w)]
        return abs(self.mean - other.mean) <= sum(widths)

    def columns(self) -> dict[str, str]:
        """The numbers apart, for a program to read."""
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


@dataclass(frozen=True)
class Result:
    """What one finished run has reached.

    Attributes:
        record: Its `results.json`.
        episodes: (N,) the metric of each test episode.
        curve: (P, N) the same after 0 … P - 1 inner steps; None where it was not taken.
        presentations: (N, K) the same at each presentation of a class; None where there are none.
        untrained: The mean with the initial parameters; None where it was not measured.
        beside: (N,) each of `BESIDE` that it has.
        figures: On a stream, (N,) each of `continual.summary`.
        losses: On a stream, (N, K) the loss of each step before it was learned.
        stream: Its layout.
    """

    record: Mapping[str, Any]
    episodes: Floats
    untrained: float | None
    curve: Floats | None = None
    presentations: Floats | None = None
    beside: Mapping[str, Floats] = field(default_factory=dict)
    figures: Mapping[str, Floats] = field(default_factory=dict)
    losses: Floats | None = None
    stream: Stream | None = None


@dataclass(frozen=True)
class Row:
    """A row of a comparison: one algorithm.

    Attributes:
        name: As it is typed.
        method: What it is, in a few words.
        cells: For each column (a size of task) the finished runs, one for each seed.
        failed: How many runs of each column have failed; empty stands for none.
    """

    name: str
    method: str
    cells: Sequence[Sequence[Result]]
    failed: Sequence[int] = ()


def read_result(run: RunFolder) -> Result | None:
    """The result of a run; None while it has none.

    Raises:
        ValueError: A file of the run is damaged.
    """
    if not run.has("results.json") or run.status().get("state") != "finished":
        return None
    record = run.read_json("results.json")
    prefix = continual_metrics.FIGURE
    wanted = (record["metric"], "curve", "presentations", "incoming_loss", *BESIDE)
    with np.load(run.path / "episodes.npz") as file:
        # What else there is of a stream is large, and read by its figures alone.
        names = [name for name in file if name in wanted or name.startswith(prefix)]
        arrays = {name: np.asarray(file[name], dtype=np.float64) for name in names}
    untrained = run.read_json(UNTRAINED)["mean"] if run.has(UNTRAINED) else None
    return Result(
        record,
        arrays[record["metric"]],
        untrained,
        arrays.get("curve"),
        arrays.get("presentations"),
        {name: arrays[name] for name in BESIDE if name in arrays},
        {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)},
        arrays.get("incoming_loss"),
        _layout(record),
    )


def _layout(record: Mapping[str, Any]) -> Stream | None:
    """The layout of the stream that a run is on; torch is loaded for streams alone."""
    if "layout" not in record:
        return None
    from metarun.core.types import Stream

    return Stream.of(record["layout"])


def figure_of(
    results: Sequence[Result], inner_steps: int | None = None, presentation: int | None = None
) -> Figure:
    """What runs that differ in their seed have reached; an accuracy in percent.

    Args:
        results: One for each seed, on the same episodes.
        inner_steps: A point of the adaptation curve; None takes the reported figure.
        presentation: That of a class, from 1; None takes the reported figure.

    Raises:
        LookupError: A run has no such point.
    """
    values = [_values(result, inner_steps, presentation) for result in results]
    return _over_seeds(values, _places(results))


def paired(better: Sequence[Result], worse: Sequence[Result]) -> Figure:
    """The mean difference of two methods on the same episodes, with its interval.

    The interval of paired differences leaves out zero where a paired t-test at the 5 % level
    tells the methods apart. Over several seeds each episode is averaged first.
    """
    one, other = (
        np.mean([_values(result) for result in results], axis=0) for results in (better, worse)
    )
    mean, ci95 = interval(one - other)
    return Figure(mean, ci95, len(one), places=_places(better))


def _places(results: Sequence[Result]) -> int | None:
    """Digits behind the point of a `Figure`: one of an accuracy in percent."""
    return 1 if results[0].record["metric"] == "accuracy" else None


def _values(
    result: Result, inner_steps: int | None = None, presentation: int | None = None
) -> Floats:
    """(N,) figures of the episodes in the unit in which they are shown."""
    values = result.episodes
    if presentation is not None:
        if result.presentations is None or presentation > result.presentations.shape[1]:
            raise LookupError(f"not measured at presentation {presentation}: shot")
        values = result.presentations[:, presentation - 1]
    if inner_steps is not None:
        if result.curve is None or inner_steps >= len(result.curve):
            raise LookupError(f"not measured after {inner_steps} steps: eval.curve_steps")
        values = result.curve[inner_steps]
    return 100.0 * values if result.record["metric"] == "accuracy" else values


def tables(style: Style, parts: Sequence[tuple[str, Sequence[Line]]]) -> str:
    """Tables below each other; in `csv` one table of them all, whose first column tells them apart.

    Args:
        style: See `table`; `csv` has the numbers of a figure in columns of their own.
        parts: The title and the lines of each; see `table`.
    """
    if style == "csv":
        return _csv([{"table": title, **line} for title, lines in parts for line in lines])
    return "\n".join(table(style, title, lines) for title, lines in parts)


def table(style: Style, title: str, lines: Sequence[Line]) -> str:
    """Lines under their heads, which are the keys of the first.

    Args:
        style: `terminal` fits the screen.
        title: What it is a table of.
        lines: At least one, all with the same keys.
    """
    heads = list(lines[0])
    cells = [[str(line[head]) for head in heads] for line in lines]
    if style == "markdown":
        body = [_line(heads), _line(["---"] * len(heads)), *map(_line, cells)]
        return "\n".join([f"**{title}**", "", *body, ""])
    return _latex(title, heads, cells) if style == "latex" else _terminal(title, heads, cells)


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
    """Text as LaTeX prints it."""
    marked = "".join("\\" + c if c in "&%$#_{}" else c for c in text)
    return marked.replace("±", r"$\pm$").replace("–", "--")


def _terminal(title: str, heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Aligned columns, those without any content left out; a figure is never cut or wrapped."""
    kept = [column for column in range(len(heads)) if any(row[column] for row in cells)]
    rows = [[row[column] for column in kept] for row in (heads, *cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    rule = "─" * max(map(len, lines))
    return "\n".join([title, rule, lines[0], rule, *lines[1:], rule, ""])


def comparison(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Rows as a table in Markdown, the best of the first column first.

    Args:
        rows: One for each algorithm.
        columns: Names of the sizes.
    """
    results = [result for row in rows for cell in row.cells for result in cell]
    regression = any(result.record["metric"] == "mse" for result in results)
    title = "MSE" if regression else "accuracy, %"
    # What is measured is known from a run alone.
    named = [f"{name}: {title}" if results else name for name in columns]
    heads = ["`algo=`", "method", *named]
    beside = [n for n in BESIDE if any(n in result.beside for result in results)]
    heads += [BESIDE[name] for name in beside]
    heads += ["before training", "tasks", "training", "parameters", "batch norm"]
    ordered = sorted(rows, key=lambda row: _order(row, regression))
    counts = sorted({len(result.episodes) for result in results})
    seeds = sorted({len(cell) for row in rows for cell in row.cells if cell})
    note = (
        f"{_either(counts)} test episodes; mean ± 95 % interval over episodes; {_either(seeds)} "
        "seed(s), with the interval over seeds in brackets where there are several."
    )
    lines = [
        _line(heads),
        _line(["---"] * len(heads)),
        *(_line(_cells(row, beside)) for row in ordered),
    ]
    return "\n".join([*lines, "", note] if results else lines)


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
"""What a figure of `continual.summary` is called in a table; accuracies are in percent there."""

_NOT_METRICS = ("cumulative_loss", "rows_to")


@quiet
def stream_comparison(rows: Sequence[Row], against: Row | None = None) -> str:
    """Learners along the same streams as a table in Markdown, the best at the end first.

    Args:
        rows: One for each algorithm, with one cell: the seeds.
        against: Whom regret is counted against; it has the seeds of the others.
    """
    results = [result for row in rows for cell in row.cells for result in cell]
    if not results:
        return "nothing is finished yet"
    regression = results[0].record["metric"] == "mse"
    shown_figures = [n for n in STREAM_HEADS if any(n in result.figures for result in results)]
    title = "MSE" if regression else "accuracy, %"
    heads = ["`algo=`", "method", f"{title}, at the end"]
    heads += [STREAM_HEADS[name] for name in shown_figures]
    if against is not None:
        heads += [f"regret against `{against.name}`", "grows as rows to the power"]
    heads += ["training", "parameters"]
    ordered = sorted(rows, key=lambda row: _order(row, regression))
    lines = [_line(heads), _line(["---"] * len(heads))]
    lines += [_line(_stream_cells(row, shown_figures, against)) for row in ordered]
    counts = sorted({len(result.episodes) for result in results})
    seeds = sorted({len(cell) for row in rows for cell in row.cells if cell})
    note = (
        f"{_either(counts)} lifetimes; mean ± 95 % interval over them; {_either(seeds)} seed(s), "
        "with the interval over seeds in brackets where there are several."
    )
    return "\n".join([*lines, "", note])


def _stream_cells(row: Row, names: Sequence[str], against: Row | None) -> list[str]:
    cell = row.cells[0]
    cells = [f"`{row.name}`", row.method, *_figures(row)]
    if not cell:
        return [*cells, *[""] * (len(names) + (2 if against else 0) + 2)]
    percent = 100.0 if cell[0].record["metric"] == "accuracy" else 1.0
    for name in names:
        scale = 1.0 if name.startswith(_NOT_METRICS) else percent
        values = [scale * result.figures[name] for result in cell if name in result.figures]
        places = 1 if scale != 1.0 or name.startswith("rows_to") else None
        cells.append(str(_over_seeds(values, places)) if values else "")
    if against is not None:
        cells += _regret_cells(row, against)
    seconds = _mean([result.record["train_seconds"] for result in cell], duration)
    return [*cells, seconds, f"{cell[0].record['parameters']:,}"]


def _regret_cells(row: Row, against: Row) -> list[str]:
    """The regret at the end and how fast it grows, or why it is not there.

    Raises:
        ValueError: The two have lived along different streams.
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
                f"algo={against.name} has lived along other streams than algo={row.name}: no "
                "regret can be counted"
            )
        assert result.losses is not None
        assert other.losses is not None
        assert result.stream is not None
        curves.append(continual_metrics.regret(result.losses, other.losses, result.stream))
    ends = _over_seeds([curve[:, -1] for curve in curves])
    powers = np.concatenate([continual_metrics.growth(curve) for curve in curves])
    growing = np.isfinite(powers)
    if not growing.any():
        return [str(ends), "–"]
    # Lifetimes that regret nothing have no power; how many have one is said.
    mark = "" if growing.all() else f"{growing.sum()} of {len(powers)} lifetimes"
    return [str(ends), str(replace(_over_seeds([powers[growing]]), mark=mark))]


def _over_seeds(values: Sequence[Floats], places: int | None = None) -> Figure:
    """Arrays (N,) of the same lifetimes, one for each seed, as a figure."""
    mean, ci95 = interval(np.mean(values, axis=0))
    over_seeds = interval([v.mean() for v in values])[1] if len(values) > 1 else None
    return Figure(mean, ci95, len(values[0]), len(values), over_seeds, places)


def _cells(row: Row, beside: Sequence[str]) -> list[str]:
    results = [result for cell in row.cells for result in cell]
    figures = _figures(row)
    if not results:
        return [f"`{row.name}`", row.method, *figures, *[""] * (len(beside) + 5)]
    record = results[0].record
    seconds = [_mean([r.record["train_seconds"] for r in cell], duration) for cell in row.cells]
    return [
        f"`{row.name}`",
        row.method,
        *figures,
        *(" / ".join(_beside(cell, name) for cell in row.cells) for name in beside),
        " / ".join(_untrained(cell) for cell in row.cells),
        f"{record['steps'] * record['tasks_per_step']:,}",
        " / ".join(seconds),
        f"{record['parameters']:,}",
        record["bn_statistics"],
    ]


def _figures(row: Row) -> list[str]:
    """What each column shows: a figure, or why there is none; seeds that failed are counted."""
    shown_figures: list[str] = []
    for cell, failed in zip(row.cells, row.failed or [0] * len(row.cells), strict=True):
        if not cell:
            shown_figures.append("failed" if failed else "not run")
        else:
            mark = f"{failed} failed" if failed else ""
            shown_figures.append(str(replace(figure_of(cell), mark=mark)))
    return shown_figures


def _beside(cell: Sequence[Result], name: str) -> str:
    """A figure beside the metric, over the seeds that have it; a share is in percent."""
    scale, places = (100.0, 1) if name == "coverage" else (1.0, 2)
    values = [scale * result.beside[name] for result in cell if name in result.beside]
    return str(_over_seeds(values, places)) if values else "–"


def _untrained(cell: Sequence[Result]) -> str:
    found = [result.untrained for result in cell if result.untrained is not None]
    accuracy = bool(cell) and cell[0].record["metric"] == "accuracy"
    return _mean(found, lambda mean: str(shown(mean, accuracy=accuracy)))


def _mean(values: Sequence[float], show: Any) -> str:
    return show(float(np.mean(values))) if values else "–"


def shown(value: float, *, accuracy: bool) -> Figure:
    """A fraction as an accuracy in percent, or an error."""
    return Figure(100.0 * value, places=1) if accuracy else Figure(value)


def _order(row: Row, regression: bool) -> float:
    """Best first; what diverged or was not run last."""
    means = [float(result.episodes.mean()) for result in row.cells[0]]
    if not means or not np.isfinite(means).all():
        return math.inf
    mean = float(np.mean(means))
    return mean if regression else -mean


def _either(counts: Sequence[int]) -> str:
    return " or ".join(map(str, counts))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
