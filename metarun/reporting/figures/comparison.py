"""Several runs in one figure: what each has reached, along training and over inner steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
"""Entries that have a line of their own; of more the best are shown."""
_LEGEND = 16
_LETTERS = 40
_FEW = 3
"""Entries whose intervals can be told apart; of more only the best has its own."""


@dataclass(frozen=True)
class Entry:
    """Runs that differ in their seed alone, as one line of a figure.

    Attributes:
        key: `entry0`, `entry1` …: the series that it is in every figure.
        label: What to call them.
        runs: One for each seed.
        typed: What was typed for them, by key.
        mean, ci95: On meta-test, in the unit in which it is shown.
        val: The mean of the best figures on meta-val; not a number where there is none.
        color, dash: Of its algorithm, and among those of the same algorithm.
        best: Whether meta-val chooses it.
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
        """Of its line: the best is thick."""
        return 2.4 if self.best else 1.1


def panels(entries: Sequence[Entry], metric: str) -> list[Panel]:
    """The figures of runs that have the same metric, best on meta-val first."""
    made = [reached(entries, metric), learning(entries, metric), adaptation(entries, metric)]
    return [
        *(panel for panel in made if panel is not None),
        *settings(entries, metric),
        *_along(entries),
    ]


def reached(entries: Sequence[Entry], metric: str) -> Panel:
    """A dot and its interval for each, on meta-test."""
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
    summary = "there is no meta-val to choose by"
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
"""Places along x, means there, and the half-widths of their intervals."""


def learning(entries: Sequence[Entry], metric: str) -> Panel | None:
    """Meta-val along training; of several seeds the mean and their interval."""
    label = unit(metric)[1]
    curves = {entry.key: _val(entry, metric) for entry in entries}
    if all(len(steps) < 2 for steps, _, _ in curves.values()):
        return None
    figure, columns = _drawn(entries, curves, metric, "meta-updates", f"meta-val {label}")
    return Panel(
        "learning-together",
        "Learning",
        f"Meta-val along training, a line for each of {len(entries)}; the best is thick. Of "
        "several seeds the mean; bands are 95 % intervals, over seeds where there are several, "
        f"else over episodes{_whose(entries)}.",
        f"Meta-val {label} against meta-updates of {len(entries)} runs.",
        figure,
        columns,
        _legend(entries),
    )


def _whose(entries: Sequence[Entry]) -> str:
    return "" if len(entries) <= _FEW else ", shown for the best alone"


def _val(entry: Entry, metric: str) -> Curve:
    """Steps that all seeds were validated at, and the mean with its half-width."""
    found = [run.curve(f"val/{metric}") for run in entry.runs]
    if len(found) == 1:
        return *found[0], entry.runs[0].curve(f"val/{metric}_ci95")[1]
    common = sorted(set.intersection(*(set(map(float, steps)) for steps, _ in found)))
    rows = [[dict(zip(*pair, strict=True))[step] for step in common] for pair in found]
    return np.array(common), *_intervals(np.array(rows).T)


def adaptation(entries: Sequence[Entry], metric: str) -> Panel | None:
    """The figure after each inner step, of those that take steps."""
    label = unit(metric)[1]
    theirs = [entry for entry in entries if all("curve" in run.arrays for run in entry.runs)]
    curves = {entry.key: _steps(entry) for entry in theirs}
    if all(len(steps) < 2 for steps, _, _ in curves.values()):
        return None
    figure, columns = _drawn(theirs, curves, metric, "inner steps", label)
    return Panel(
        "adaptation-together",
        "Adaptation",
        "The same test tasks after each inner step, of the runs that adapt by steps; of several "
        f"seeds each episode's mean. Bands are 95 % intervals over episodes{_whose(theirs)}.",
        f"{label} against inner steps of {len(theirs)} runs.",
        figure,
        columns,
        _legend(theirs),
    )


def _steps(entry: Entry) -> Curve:
    """The mean over test episodes after each inner step; episodes are averaged over seeds."""
    mean = np.mean([run.arrays["curve"] for run in entry.runs], axis=0)
    return np.arange(len(mean), dtype=np.float64), *_intervals(mean)


def _intervals(rows: Floats) -> tuple[Floats, Floats]:
    """Mean and half-width of each row."""
    found = np.array([interval(row) for row in rows]).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _drawn(
    entries: Sequence[Entry], curves: Mapping[str, Curve], metric: str, x: str, y: str
) -> tuple[Figure, dict[str, list[Any]]]:
    """A line for each entry, the best over all others, and the numbers in them."""
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
    """Meta-val against each number that was swept."""
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
    return Panel(
        f"setting-{key.replace('.', '-')}",
        key,
        f"The best figure on meta-val of each run that has a number for {key}; the dotted line is "
        "their mean, the diamond the best run.",
        f"Meta-val {label} against {key}.",
        figure,
        {
            key: [value for value, _ in found],
            "run": [entry.label for _, entry in found],
            f"meta-val {metric}": [entry.val for _, entry in found],
        },
    )


def _along(entries: Sequence[Entry]) -> list[Panel]:
    """The curves of learners along the same streams."""
    stream_record = {e.label: [run.path for run in e.runs] for e in entries if _has_stream(e)}
    if len(stream_record) < 2:
        return []
    looks = {entry.label: (entry.color, entry.dash) for entry in entries}
    figure, columns = streams.together(stream_record, looks)
    return [
        Panel(
            "stream-together",
            "Along the stream",
            "The figure on the task at hand, the loss of all incoming rows so far, and the figure "
            "on all tasks met; bands are the 95 % interval over lifetimes.",
            f"Three curves along the stream of each of {len(stream_record)} learners.",
            figure,
            columns,
        )
    ]


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
    """Names of the lines, where they are few enough to be read."""
    if len(entries) > _LEGEND:
        return None
    return {entry.key: Series(entry.label, entry.color, entry.dash) for entry in entries}


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _short(label: str) -> str:
    return label if len(label) <= _LETTERS else f"{label[: _LETTERS - 1]}…"
