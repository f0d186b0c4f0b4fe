"""Figure of the bench results: speed ratios, and growth of time and memory.

It is drawn from a record, as in the file of `--json`, so that an earlier run can be drawn anew.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metarun.bench.tables import machine, times
from metarun.bench.workloads import WORKLOADS, Variant
from metarun.reporting.figures.drawing import (
    COLORS,
    INK,
    MARKERS,
    STYLE,
    Panel,
    Series,
    file_of,
    plain,
)

Record = Mapping[str, Any]
"""A record of the bench, or a part of it, see `results.record`."""

_WIDTH = 9.0
"""Width in inches, at which letters can be read on a slide."""
_BAR, _GAP = 0.3, 0.35
"""Inches of a bar, and bars between two groups of bars."""
_AXIS = 0.65
_PANEL = 3.2
_LETTERS = 38
_OURS = "metarun"
_PLAIN = {
    "functional": "functional loop",
    "plain": "plain loop over tasks",
    "PIL": "loop over image files",
}
"""Baselines whose name alone says little."""
_SIZES = {
    "tasks": "tasks in a step",
    "shots": "support images per class",
    "steps": "inner steps",
    "image": "side of an image, pixels",
    "processes": "processes",
}


_IN_TITLES = {"steps": "inner steps"}


def picture(record: Record, kind: str) -> bytes:
    """Return the figure as a file of `kind` `svg` or `png`: bars of ratios, and curves below."""
    results = [result for result in record["results"] if result["baselines"]]
    grown = [list(g) for _, g in groupby(record["growth"], lambda c: (c["workload"], c["size"]))]
    panels = [(group, what) for group in grown for what in _measured(group)]
    looks = _looks(results, record["growth"])
    bars = sum(len(result["baselines"]) + _GAP for result in results)
    heights = [_AXIS + _BAR * bars] if results else []
    heights += [_PANEL] * -(-len(panels) // 2)
    with rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, max(sum(heights), 1.0)))
        rows: Any = figure.subfigures(max(len(heights), 1), 1, height_ratios=heights, squeeze=False)
        drawn: set[str] = set()
        if results:
            drawn |= _ratios(rows[0, 0].add_subplot(), results, looks)
        for row, start in zip(rows[bool(results) :, 0], range(0, len(panels), 2), strict=True):
            two = panels[start : start + 2]
            for axes, (group, what) in zip(row.subplots(1, len(two), squeeze=False)[0], two,
                                           strict=True):  # fmt: skip
                drawn |= _growth(axes, group, what, looks)
        title = "Speed of metarun against other implementations"
        if not results and panels:
            sizes = dict.fromkeys(_IN_TITLES.get(g[0]["size"], g[0]["size"]) for g, _ in panels)
            rates = all(what == "tasks_per_second" for _, what in panels)
            title = f"{'Tasks per second' if rates else 'A step'} by {' and by '.join(sizes)}"
        legend = {name: look for name, look in looks.items() if name in drawn}
        peaks = {name: 1e9 * value for name, value in record["peak_gflops"].items()}
        panel = Panel("bench", title, "", "", figure, {}, legend)
        grown_works = dict.fromkeys(f". {g[0]['workload']}: {_about(g[0])}" for g in grown)
        about = f"{machine(record['machine'], peaks)}{''.join(grown_works)}"
        return file_of(panel, about, kind)


def _about(curve: Record) -> str:
    return next((w.about for w in WORKLOADS if w.name == curve["workload"]), "")


def _looks(results: Iterable[Record], curves: Iterable[Record]) -> dict[str, Series]:
    """Return the color and marker of each implementation, the same in bars and curves."""
    sides = [curve["side"] for curve in curves]
    markers = MARKERS if sides else ("s",)
    names = [_OURS, *(baseline["name"] for r in results for baseline in r["baselines"]), *sides]
    return {
        name: Series(
            _PLAIN.get(name, name), COLORS[at % len(COLORS)], marker=markers[at % len(markers)]
        )
        for at, name in enumerate(dict.fromkeys(names))
    }


def _ratios(axes: Axes, results: Sequence[Record], looks: Mapping[str, Series]) -> set[str]:
    """Draw a group of bars for each workload and variant, the first on top; return their names."""
    place, ticks = 0.0, []
    for result in results:
        first = place
        for baseline in result["baselines"]:
            ratio, (low, high) = baseline["ratio"], baseline["ratio_quartiles"]
            color = looks[baseline["name"]].color
            axes.barh(place, ratio - 1.0, left=1.0, height=0.8, color=color)
            axes.plot([low, high], [place, place], color=INK, linewidth=1.2)
            axes.annotate(
                f"{times(ratio)}×", (max(ratio, high, 1.0), place), xytext=(5, 0),
                textcoords="offset points", va="center",
            )  # fmt: skip
            place -= 1.0
        ticks.append(((first + place + 1.0) / 2, _name(result)))
        place -= _GAP
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes.set_ylim(place + _GAP + 0.4, 0.6)
    axes.grid(visible=False, axis="y")
    axes.axvline(1.0, color=INK, linewidth=1.0)
    axes.set_xscale("log")
    plain(axes.xaxis)
    baselines = [baseline for result in results for baseline in result["baselines"]]
    ends = [end for b in baselines for end in (b["ratio"], *b["ratio_quartiles"])]
    axes.set_xlim(min(0.8, 0.9 * min(ends)), max(2.0, 1.35 * max(ends)))
    axes.set_xlabel(
        "times as fast as the other implementation; right of 1, metarun is faster\n"
        "(thin line: middle half of the rounds)"
    )
    return {baseline["name"] for baseline in baselines}


def _name(result: Record) -> str:
    """Return what a workload is, and which options of ours were timed, in lines that fit."""
    defaults = asdict(Variant())
    own = [f"{key}={v}" for key, v in result["variant"].items() if v != defaults.get(key)]
    return textwrap.fill(", ".join([result["workload"]["about"], *own]), _LETTERS)


def _measured(curves: Sequence[Record]) -> list[str]:
    """Return what the curves of a size have numbers of."""
    names = ("milliseconds", "memory")
    points = [point for curve in curves for point in curve["points"]]
    found = [name for name in names if any(point[name] for point in points)]
    return found or ["tasks_per_second"]


def _growth(
    axes: Axes, curves: Sequence[Record], what: str, looks: Mapping[str, Series]
) -> set[str]:
    """Draw time, memory or tasks per second against a size; return the names of the curves."""
    size = curves[0]["size"]
    for curve in curves:
        points = [point for point in curve["points"] if point[what]]
        look = looks[curve["side"]]
        axes.plot(
            [point["size"] for point in points], [point[what] for point in points],
            color=look.color, marker=look.marker, markersize=5,
        )  # fmt: skip
    labels = {
        "milliseconds": "time of a step, ms",
        "memory": "memory of a step, MiB",
        "tasks_per_second": "tasks per second",
    }
    axes.set_title(f"{curves[0]['workload']}, by {size}", loc="left")
    axes.set(xlabel=_SIZES[size], ylabel=labels[what])
    axes.set_xscale("log")
    plain(axes.xaxis)
    if what == "tasks_per_second":
        axes.set_ylim(bottom=0.0)
    else:
        axes.set_yscale("log")
        plain(axes.yaxis)
    axes.set_xticks([point["size"] for point in curves[0]["points"]])
    axes.minorticks_off()
    return {curve["side"] for curve in curves}
