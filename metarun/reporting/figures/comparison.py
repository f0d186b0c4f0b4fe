"""Figures that compare runs: meta-test, learning curves, inner steps, swept settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from metarun.core.statistics import Floats, interval
from metarun.reporting.figures import streams
from metarun.reporting.figures.curves import unit, whole_steps
from metarun.reporting.figures.drawing import (
    INK,
    SIZE,
    Panel,
    Series,
    band,
    error_axis,
    named_rows,
    plain,
)
from metarun.reporting.run_files import RunFiles

_NAMED = 40
"""Largest number of rows; only the best entries are shown if there are more."""
_LEGEND = 16
_LETTERS = 40
_FEW = 3
"""Largest number of entries that all have a band; with more, only the best has one."""


@dataclass(frozen=True)
class Entry:
    """Runs that differ only in their seed, as one line of a figure.

    Attributes:
        key: Name of its series in every figure: `entry0`, `entry1` …
        label: Name shown in figures and tables.
        runs: Runs of the entry, one for each seed.
        typed: Command-line overrides by key.
        mean, ci95: Meta-test figure and half-width of its interval, in the displayed unit.
        val: Mean of the best figures on meta-val; NaN if there are none.
        color, dash: Color of its algorithm, and line style among entries of that algorithm.
        best: Whether it is the best entry on meta-val.
    """

    key: str
    label: str
    runs: Sequence[RunFiles]
    typed: Mapping[str, str]
    mean: float
    ci95: float | None
    val: float
    color: str
    dash: str
    best: bool

    @property
    def width(self) -> float:
        """Width of its line; the best entry has a thick one."""
        return 2.4 if self.best else 1.1


def panels(entries: Sequence[Entry], metric: str) -> list[Panel]:
    """Return the figures that compare entries with the same metric, best on meta-val first."""
    made = [reached(entries, metric), learning(entries, metric), adaptation(entries, metric)]
    return [
        *(panel for panel in made if panel is not None),
        *settings(entries, metric),
        *_along(entries),
    ]


def reached(entries: Sequence[Entry], metric: str) -> Panel:
    """Return a figure with the meta-test mean and interval of each entry."""
    label = unit(metric)[1]
    shown = entries[:_NAMED]
    figure, axes, places = named_rows([_short(entry.label) for entry in shown], 0.24)
    for place, entry in zip(places, shown, strict=True):
        width = 0.0 if entry.ci95 is None or np.isnan(entry.ci95) else entry.ci95
        bars = axes.errorbar(
            entry.mean,
            place,
            xerr=width,
            fmt="D" if entry.best else "o",
            color=entry.color,
            markersize=6 if entry.best else 4,
            linewidth=1.3,
        )
        for part, artist in enumerate([bars.lines[0], *bars.lines[2]]):
            artist.set_gid(f"{entry.key}-{part}")
    axes.set(xlabel=f"meta-test {label}")
    some = "" if len(shown) == len(entries) else f" The best {_NAMED} of {len(entries)} are shown."
    summary = "there is no meta-val figure to select by"
    for entry in entries:
        if entry.best:
            summary = f"{entry.label} is best on meta-val, with {entry.mean:.4g} here (the diamond)"
    return Panel(
        "reached",
        "Meta-test",
        f"Mean and 95 % interval over test episodes: {summary}.{some}",
        f"{len(shown)} runs by their meta-test {label}: {summary}.",
        figure,
        {
            "run": [entry.label for entry in entries],
            "meta-val": [entry.val for entry in entries],
            "meta-test": [entry.mean for entry in entries],
            "ci95": [float("nan") if e.ci95 is None else e.ci95 for e in entries],
        },
    )


Curve = tuple[Floats, Floats, Floats]
"""Positions along x, means at these positions, and half-widths of their intervals."""


def learning(entries: Sequence[Entry], metric: str) -> Panel | None:
    """Return a figure of meta-val along training, averaged over seeds; None without curves."""
    label = unit(metric)[1]
    curves = {entry.key: _val(entry, metric) for entry in entries}
    if all(len(steps) < 2 for steps, _, _ in curves.values()):
        return None
    figure, columns = _drawn(entries, curves, metric, "meta-updates", f"meta-val {label}")
    return Panel(
        "learning-together",
        "Learning",
        f"Meta-val along training, averaged over seeds, for {len(entries)} entries; the best is "
        "the thick line. Bands are 95 % intervals over seeds, or over episodes if there is one "
        f"seed{_whose(entries)}.",
        f"Meta-val {label} against meta-updates of {len(entries)} runs.",
        figure,
        columns,
        _legend(entries),
    )


def _whose(entries: Sequence[Entry]) -> str:
    return "" if len(entries) <= _FEW else ", shown for the best entry only"


def _val(entry: Entry, metric: str) -> Curve:
    """Return the steps at which all seeds were validated, with mean and half-width there."""
    found = [run.curve(f"val/{metric}") for run in entry.runs]
    if len(found) == 1:
        return *found[0], entry.runs[0].curve(f"val/{metric}_ci95")[1]
    by_step = [dict(zip(map(float, steps), values, strict=True)) for steps, values in found]
    common = sorted(set.intersection(*map(set, by_step)))
    rows = [[own[step] for step in common] for own in by_step]
    return np.array(common), *_intervals(np.array(rows).T)


def adaptation(entries: Sequence[Entry], metric: str) -> Panel | None:
    """Return a figure of the metric after each inner step; None without inner steps."""
    label = unit(metric)[1]
    theirs = [entry for entry in entries if all("curve" in run.arrays for run in entry.runs)]
    curves = {entry.key: _steps(entry) for entry in theirs}
    if all(len(steps) < 2 for steps, _, _ in curves.values()):
        return None
    figure, columns = _drawn(theirs, curves, metric, "inner steps", label)
    return Panel(
        "adaptation-together",
        "Adaptation",
        "The same test tasks after each inner step, for runs with inner steps. Episodes are "
        f"averaged over seeds. Bands are 95 % intervals over episodes{_whose(theirs)}.",
        f"{label} against inner steps of {len(theirs)} runs.",
        figure,
        columns,
        _legend(theirs),
    )


def _steps(entry: Entry) -> Curve:
    """Return the mean over test episodes after each inner step, averaged over seeds first."""
    mean = np.mean([run.arrays["curve"] for run in entry.runs], axis=0)
    return np.arange(len(mean), dtype=np.float64), *_intervals(mean)


def _intervals(rows: Floats) -> tuple[Floats, Floats]:
    """Return the mean and the half-width of the interval of each row."""
    found = np.array([interval(row) for row in rows]).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _drawn(
    entries: Sequence[Entry], curves: Mapping[str, Curve], metric: str, x: str, y: str
) -> tuple[Figure, dict[str, list[Any]]]:
    """Draw a line for each entry, the best on top, and return the figure and its numbers."""
    scale = unit(metric)[0]
    figure = Figure(figsize=SIZE)
    axes = figure.add_subplot()
    columns: dict[str, list[Any]] = {"run": [], x: [], metric: [], "ci95": []}
    for entry in reversed(entries):
        places, mean, width = curves[entry.key]
        _line(axes, entry, places, scale * mean, scale * width, banded=len(entries) <= _FEW)
    for entry in entries:
        places, mean, width = curves[entry.key]
        columns["run"] += [entry.label] * len(places)
        columns[x] += [int(place) for place in places]
        columns[metric] += list(map(float, mean))
        columns["ci95"] += list(map(float, width))
    if metric != "accuracy":
        error_axis(axes, np.concatenate([mean for _, mean, _ in curves.values()]))
    axes.set(xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(whole_steps())
    return figure, columns


def settings(entries: Sequence[Entry], metric: str) -> list[Panel]:
    """Return a figure of meta-val against each numeric setting that was swept."""
    keys = dict.fromkeys(key for entry in entries for key in entry.typed)
    made: list[Panel] = []
    for key in keys:
        found = [
            (value, entry)
            for entry in entries
            if np.isfinite(value := _number(entry.typed.get(key))) and np.isfinite(entry.val)
        ]
        values = sorted({value for value, _ in found})
        if len(values) < 2:
            continue
        made.append(_setting(key, found, values, metric))
    return made


def _setting(
    key: str, found: Sequence[tuple[float, Entry]], values: Sequence[float], metric: str
) -> Panel:
    scale, label = unit(metric)
    figure = Figure(figsize=SIZE)
    axes = figure.add_subplot()
    for value, entry in found:
        axes.plot(
            value,
            scale * entry.val,
            "D" if entry.best else "o",
            color=entry.color,
            markersize=7 if entry.best else 5,
            alpha=0.85,
            gid=f"{entry.key}-dot",
        )
    means = [float(np.mean([scale * e.val for v, e in found if v == value])) for value in values]
    axes.plot(values, means, color=INK, linewidth=1.0, linestyle=":")
    if values[0] > 0 and values[-1] >= 10 * values[0]:
        axes.set_xscale("log")
        plain(axes.xaxis)
    axes.set(xlabel=key, ylabel=f"meta-val {label}")
    # A stored key must not lead out of the folder of figures.
    file_name = re.sub(r"[^\w-]", "-", key)
    return Panel(
        f"setting-{file_name}",
        key,
        f"Best meta-val figure of each run with a number for {key}. The dotted line is the mean "
        "at each value, the diamond the best run.",
        f"Meta-val {label} against {key}.",
        figure,
        {
            key: [value for value, _ in found],
            "run": [entry.label for _, entry in found],
            f"meta-val {metric}": [entry.val for _, entry in found],
        },
    )


def _along(entries: Sequence[Entry]) -> list[Panel]:
    """Return a figure of learners' curves along the same streams; none for one learner."""
    folders = {e.key: [run.path for run in e.runs] for e in entries if _has_stream(e)}
    if len(folders) < 2:
        return []
    panel = streams.together(folders, _series(entries), "stream-together")
    return [panel if len(entries) <= _LEGEND else replace(panel, series=None)]


def _has_stream(entry: Entry) -> bool:
    return all((run.path / "stream.csv").exists() for run in entry.runs)


def _line(axes: Any, entry: Entry, x: Floats, mean: Floats, width: Floats, *, banded: bool) -> None:
    axes.plot(
        x,
        mean,
        color=entry.color,
        linestyle=entry.dash,
        linewidth=entry.width,
        alpha=1.0 if entry.best or banded else 0.8,
        marker="o" if len(x) < 3 else None,
        markersize=3,
        gid=entry.key,
    )
    if banded or entry.best:
        band(axes, x, mean, width, entry.color, entry.key)


def _legend(entries: Sequence[Entry]) -> dict[str, Series] | None:
    """Return the legend of the lines; None if there are too many to read."""
    return _series(entries) if len(entries) <= _LEGEND else None


def _series(entries: Sequence[Entry]) -> dict[str, Series]:
    return {entry.key: Series(entry.label, entry.color, entry.dash) for entry in entries}


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _short(label: str) -> str:
    return label if len(label) <= _LETTERS else f"{label[: _LETTERS - 1]}…"
