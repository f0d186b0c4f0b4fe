"""Tables of the results for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from metarun.bench.results import Curve, Entry, Point, Result
from metarun.reporting import tables

_HEADINGS = ("", "ms", "metarun's speedup", "differs", "of peak", "MiB", "first, ms")
_IN_MARKDOWN = (
    "workload", "metarun, ms", "against", "its ms", "ratio (middle half)", "differs by",
    "of peak: ours, its", "MiB: ours, its",
)  # fmt: skip


def terminal(results: Sequence[Result]) -> Table:
    """Return a table with a group of lines for each workload and variant, ours first."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i > 0)
    for result in results:
        table.add_row(Text(result.workload.name, style="bold"))
        table.add_row(f"  {result.label}", *_figures(result, result.ours))
        for baseline in result.baselines:
            table.add_row(f"  {baseline.name}", *_figures(result, baseline))
    return table


def markdown(results: Sequence[Result]) -> str:
    """Return a Markdown table with a line for each baseline."""
    rows: list[list[str]] = []
    for result in results:
        work = f"{result.workload.about} ({result.label.removeprefix('metarun (').rstrip(')')})"
        if result.label == "metarun":
            work = result.workload.about
        for baseline in result.baselines:
            shares = [share(result.share(entry)) for entry in (result.ours, baseline)]
            sizes = [size(entry.memory) for entry in (result.ours, baseline)]
            cells = [
                work,
                milliseconds(result.ours.times.median),
                baseline.name,
                milliseconds(baseline.times.median),
                _ratio(result, baseline),
                _difference(baseline),
                ", ".join(shares),
                ", ".join(sizes),
            ]
            rows.append(cells)
    return tables.markdown(_IN_MARKDOWN, rows)


def growth(curves: Sequence[Curve]) -> Table:
    """Return a table of growth curves of the same workload and size, side by side."""
    first = curves[0]
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left",
        title=Text(f"{first.workload}, by {first.size}", style="bold"),
    )  # fmt: skip
    table.add_column(first.size, justify="right")
    processes = first.size == "processes"
    for curve in curves:
        table.add_column(f"{curve.side}: {'tasks/s' if processes else 'ms'}", justify="right")
        if not processes:
            table.add_column("MiB", justify="right")
    for points in zip(*(curve.points for curve in curves), strict=True):
        cells = [cell for point in points for cell in _point(point)]
        table.add_row(str(points[0].size), *cells)
    return table


def machine(about: Mapping[str, Any], peaks: Mapping[str, float]) -> str:
    """Return the processor or GPU, versions and speed of a machine in one line.

    Args:
        about: The machine, as in a record of the bench.
        peaks: Operations per second of its matrix products, by precision.
    """
    gpu = str(about["device"]).startswith("cuda")
    where = about["device_name"] if gpu else about["processor"]
    rates = [f"{value / 1e9:,.0f} GFLOP/s in {name}" for name, value in peaks.items()]
    return (
        f"{where}, {about['cores']} cores, torch {about['versions']['torch']} with "
        f"{about['torch_threads']} threads; matrix products: {' and '.join(rates)}"
    )


def milliseconds(seconds: float) -> str:
    """Format seconds as milliseconds with three significant digits or more."""
    value = 1e3 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def share(value: float | None) -> str:
    """Format a share in percent; a dash for None."""
    if value is None:
        return "–"
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.1f} %"


def size(value: float | None) -> str:
    """Format a size in MiB; a dash for None."""
    if value is None:
        return "–"
    if value < 1:
        # Below 1 MiB, pages of the allocator dominate, not the step.
        return "<1"
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def times(value: float) -> str:
    """Format a ratio with three significant digits or more."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _point(point: Point) -> list[str]:
    if point.milliseconds is None:
        return [f"{point.tasks_per_second:.3g}"]
    return [milliseconds(point.milliseconds / 1e3), size(point.memory)]


def _figures(result: Result, entry: Entry) -> list[str]:
    return [
        milliseconds(entry.times.median),
        "" if entry is result.ours else _ratio(result, entry),
        "" if entry is result.ours else _difference(entry),
        share(result.share(entry)),
        size(entry.memory),
        milliseconds(entry.times.first),
    ]


def _ratio(result: Result, baseline: Entry) -> str:
    ratio = result.ratio(baseline)
    return f"{times(ratio.value)}× ({times(ratio.low)}–{times(ratio.high)})"


def _difference(entry: Entry) -> str:
    return "–" if entry.difference is None else f"{entry.difference:.0e}"
