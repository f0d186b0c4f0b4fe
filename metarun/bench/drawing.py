"""Figure of the bench results: speed ratios, and growth of time and memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metarun.bench.results import Curve, Ratio, Result
from metarun.bench.tables import times
from metarun.reporting.figures.drawing import COLORS, INK, MARKERS, MUTED, STYLE, plain

_WIDTH = 8.0
_BAR, _GROUP_GAP = 0.19, 0.75
_PANEL = 2.6
_DPI = 150


def picture(results: Sequence[Result], curves: Sequence[Curve], title: str, kind: str) -> bytes:
    """Return the figure as a file of `kind` `svg` or `png`."""
    with rc_context(STYLE):
        groups = [list(group) for _, group in groupby(curves, lambda c: (c.workload, c.size))]
        bars = sum(len(result.baselines) for result in results)
        top = 1.1 + _BAR * bars + 0.15 * len(results) if bars else 0.0
        figure = Figure(figsize=(_WIDTH, max(top + _PANEL * len(groups), 2.0)))
        parts: Any = figure.subfigures(
            1 + len(groups),
            1,
            height_ratios=[max(top, 0.3), *([_PANEL] * len(groups))],
            squeeze=False,
        )
        parts[0, 0].suptitle(title, x=0.01, ha="left", fontsize=9, color=MUTED)
        if bars:
            _ratios(parts[0, 0].add_subplot(), results)
        for part, group in zip(parts[1:, 0], groups, strict=True):
            _growth(part.subplots(1, 2), group)
        return _drawn(figure, kind)


def _ratios(axes: Axes, results: Sequence[Result]) -> None:
    """Draw a group of bars for each workload and variant, the first on top."""
    names = list(
        dict.fromkeys(baseline.name for result in results for baseline in result.baselines)
    )
    color = dict(zip(names, COLORS, strict=False))
    place, ticks, shown = 0.0, [], set()
    for result in results:
        if not result.baselines:
            continue
        first = place
        for baseline in result.baselines:
            ratio = result.ratio(baseline)
            axes.barh(
                place, ratio.value - 1.0, left=1.0, height=0.85, color=color[baseline.name],
                label=None if baseline.name in shown else baseline.name,
            )  # fmt: skip
            shown.add(baseline.name)
            axes.plot([ratio.low, ratio.high], [place, place], color=INK, linewidth=1.2)
            end = max(ratio.value, ratio.high, 1.0)
            axes.annotate(
                f"{times(ratio.value)}×", (end, place), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=7,
            )  # fmt: skip
            place -= 1.0
        ticks.append(((first + place + 1.0) / 2, _name(result)))
        place -= _GROUP_GAP
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
    axes.set_ylim(place + _GROUP_GAP, 1.0)
    axes.grid(visible=False, axis="y")
    axes.axvline(1.0, color=INK, linewidth=1.0)
    axes.set_xscale("log")
    plain(axes.xaxis)
    every = [
        bound for r in results for baseline in r.baselines for bound in _bounds(r.ratio(baseline))
    ]
    axes.set_xlim(min(0.8, 0.9 * min(every)), max(2.0, 1.35 * max(every)))
    axes.set_xlabel("times faster than …  (line: middle half of the rounds)")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(names), borderaxespad=0.2)


def _bounds(ratio: Ratio) -> tuple[float, float]:
    return ratio.low, ratio.high


def _name(result: Result) -> str:
    return f"{result.workload.name}, {result.variant.name}".removesuffix(", ")


def _growth(panels: Sequence[Axes], curves: Sequence[Curve]) -> None:
    """Draw time and memory of a step against a size, or tasks per second against processes."""
    size = curves[0].size
    left, right = panels
    for curve, color, marker in zip(curves, COLORS, MARKERS, strict=False):
        x = [point.size for point in curve.points]
        style: dict[str, Any] = {
            "color": color,
            "marker": marker,
            "markersize": 4,
            "label": curve.side,
        }
        if size == "processes":
            left.plot(x, [point.tasks_per_second for point in curve.points], **style)
            continue
        left.plot(x, [point.milliseconds or 0.0 for point in curve.points], **style)
        memory = [(at, p.memory) for at, p in zip(x, curve.points, strict=True) if p.memory]
        if memory:
            right.plot(*zip(*memory, strict=True), **style)
    left.set_title(f"{curves[0].workload}, by {size}", loc="left")
    left.set_ylabel("tasks/s" if size == "processes" else "ms per step")
    right.set_ylabel("MiB per step")
    for axes in panels:
        axes.set_xlabel(size)
        axes.set_xscale("log")
        plain(axes.xaxis)
        if not axes.lines:
            axes.set_visible(False)
            continue
        if size == "processes":
            axes.set_ylim(bottom=0.0)
        else:
            axes.set_yscale("log")
            plain(axes.yaxis)
        axes.set_xticks([point.size for point in curves[0].points])
        axes.minorticks_off()
    left.legend()


def _drawn(figure: Figure, kind: str) -> bytes:
    """Return a figure's file without a date, so that equal figures give equal files."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else None
    figure.savefig(buffer, format=kind, dpi=_DPI, metadata=metadata)
    return buffer.getvalue()
