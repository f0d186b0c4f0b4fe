"""Figures of one run: along training, over inner steps, over test episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metarun.core.measures import figure as shown
from metarun.core.results import CurvePoint, validation_of
from metarun.core.sizes import chance, varies
from metarun.core.statistics import Floats, interval
from metarun.core.words import number_of
from metarun.reporting.figures.drawing import (
    INK,
    MUTED,
    SIZE,
    Panel,
    Series,
    band,
    error_axis,
    plain,
)
from metarun.reporting.run_files import RunFiles

_FEWEST = 5
"""Number of values from which on a histogram is drawn."""
_MOST_BINS = 30
_FEW_POINTS = 30
"""Lines with fewer points have a dot at each."""
_FEW_EPISODES = 20
_DECADES = 100.0
"""Ratio of the largest to the smallest error above which a histogram is logarithmic."""


def unit(metric: str) -> tuple[float, str]:
    """Return the scale of a metric from stored to displayed values, and its axis label."""
    return (100.0, "accuracy, %") if metric == "accuracy" else (1.0, "mean squared error")


def whole_steps() -> MaxNLocator:
    """Return a tick locator for updates, with integer ticks even on a short axis."""
    return MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True)


def panels(run: RunFiles) -> list[Panel]:
    """Return the figures that can be drawn from a run's files."""
    made = [learning(run), loss(run), adaptation(run), histogram(run)]
    return [panel for panel in made if panel is not None]


def learning(run: RunFiles) -> Panel | None:
    """Return a figure of the metric on training and meta-val tasks; None without values."""
    metric = run.metric
    if metric is None:
        return None
    scale, label = unit(metric)
    steps, train = run.curve(f"train/{metric}")
    at, val = run.curve(f"val/{metric}")
    width = run.curve(f"val/{metric}_ci95")[1]
    lines = {
        "training": (Series("training tasks", MUTED), steps, train, np.full(len(steps), np.nan)),
        "meta-val": (Series("meta-val", run.color), at, val, width),
    }
    lines = {key: line for key, line in lines.items() if len(line[1])}
    # A learner that is validated only before training has no curve.
    if not lines or max(line[1].max() for line in lines.values()) == 0:
        return None
    figure = Figure(figsize=SIZE)
    axes = figure.add_subplot()
    columns: dict[str, list[object]] = {"split": [], "step": [], metric: [], "ci95": []}
    for key, (series, x, y, w) in lines.items():
        # A single point has no line, so it needs a marker.
        marker = "o" if len(x) < (_FEW_POINTS if key == "meta-val" else 2) else None
        (line,) = axes.plot(x, scale * y, color=series.color, marker=marker, markersize=3)
        line.set(gid=key, linewidth=1.4)
        band(axes, x, scale * y, scale * w, series.color, key)
        columns["split"] += [series.name] * len(x)
        columns["step"] += [int(step) for step in x]
        columns[metric] += list(map(float, y))
        columns["ci95"] += list(map(float, w))
    shown_series = {key: line[0] for key, line in lines.items()}
    summary = ""
    best = validation_of(run.results)
    if best:
        axes.plot(best["step"], scale * best["mean"], "D", color=INK, markersize=6, gid="best")
        shown_series["best"] = Series(f"best, step {best['step']}", INK, marker="D")
        summary = (
            f" The best was {shown(metric, best['mean'], best['ci95'])} at step {best['step']} "
            f"({best['episodes']} episodes); its parameters were used in the test."
        )
    if metric != "accuracy":
        error_axis(axes, np.concatenate([train, val]))
    chance = _chance(run)
    if chance is not None:
        axes.axhline(scale * chance, color=MUTED, linestyle=":", linewidth=1.0, gid="chance")
        shown_series["chance"] = Series("chance", MUTED, ":")
    axes.set(xlabel="meta-updates", ylabel=label)
    axes.xaxis.set_major_locator(whole_steps())
    ends = _ends(val if len(val) else train, metric)
    return Panel(
        "learning",
        "Learning",
        f"{label.split(',')[0].capitalize()} along meta-training; the band is the 95 % interval "
        f"over the episodes of meta-val.{summary}{_scale(run)}",
        f"{label} against meta-updates: {ends}.{summary}",
        figure,
        columns,
        shown_series,
    )


def _chance(run: RunFiles) -> float | None:
    """Return the accuracy of guessing; None for a regression or a stream."""
    results = run.results
    if results is None or results["metric"] != "accuracy" or "layout" in results:
        return None
    return chance(results["way"])


def _scale(run: RunFiles) -> str:
    """Say with what to compare the figure of a run: chance, no adaptation, published values."""
    results, chance = run.results, _chance(run)
    parts = [] if chance is None else [f" Chance is {shown('accuracy', chance)}."]
    curve = None if results is None else results.get("curve")
    if curve and chance is None:
        parts.append(f" Without adaptation it is {shown('mse', curve[0]['mean'])}.")
    cells = (run.config.get("published") or {}).get("cells") or []
    if cells:
        parts.append(f" Published: {' / '.join(str(cell['value']) for cell in cells)}.")
    return "".join(parts)


def loss(run: RunFiles) -> Panel | None:
    """Return a figure of the training loss; None without one, or if it equals the metric."""
    steps, values = run.curve("train/loss")
    metric = run.metric
    same = metric == "mse" and np.array_equal(values, run.curve("train/mse")[1], equal_nan=True)
    if len(steps) < 2 or same:
        return None
    figure = Figure(figsize=SIZE)
    axes = figure.add_subplot()
    axes.plot(steps, values, color=run.color, linewidth=1.4)
    axes.set(xlabel="meta-updates", ylabel="training loss")
    axes.xaxis.set_major_locator(whole_steps())
    if not (values < 0).any():
        error_axis(axes, values)
    return Panel(
        "loss",
        "Training loss",
        "Loss of the outer optimizer, averaged between two lines of the log.",
        f"Training loss against meta-updates: {_ends(values, 'loss')}.",
        figure,
        {"step": [int(step) for step in steps], "loss": list(map(float, values))},
    )


def adaptation(run: RunFiles) -> Panel | None:
    """Return a figure of the metric after each inner step; None without inner steps."""
    results = run.results
    curve = None if results is None else results["curve"]
    if results is None or curve is None or len(curve) < 2:
        return None
    metric = str(results["metric"])
    scale, label = unit(metric)
    steps, mean, width = _columns(curve)
    figure = Figure(figsize=SIZE)
    axes = figure.add_subplot()
    axes.plot(steps, scale * mean, "o-", color=run.color, linewidth=1.4, markersize=3)
    band(axes, steps, scale * mean, scale * width, run.color, "curve")
    trained = run.config["algo"].get("inner_steps")
    summary = ""
    if isinstance(trained, int) and 0 < trained < len(steps):
        axes.axvline(trained, color=MUTED, linestyle=":", linewidth=1.0)
        axes.annotate(
            " steps of training",
            (trained, 0.04),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            color=INK,
        )
        summary = f" The dotted line marks the {number_of(trained, 'inner step')} of training."
    axes.set(xlabel="inner steps", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if metric != "accuracy":
        error_axis(axes, mean)
    return Panel(
        "adaptation",
        "Adaptation",
        f"The same test tasks after 0 to {len(steps) - 1} inner steps, with the 95 % interval."
        f"{summary}",
        f"{label} against inner steps: {shown(metric, mean[0])} before the first, "
        f"{shown(metric, mean[-1])} after {len(steps) - 1}.{summary}",
        figure,
        {
            "inner steps": [int(step) for step in steps],
            metric: list(map(float, mean)),
            "ci95": list(map(float, width)),
        },
    )


def _columns(curve: Sequence[CurvePoint]) -> tuple[Floats, Floats, Floats]:
    """Return the steps, means and half-widths of an adaptation curve."""
    steps, mean, width = (
        np.array([point[name] for point in curve], dtype=np.float64)
        for name in ("steps", "mean", "ci95")
    )
    return steps, mean, width


def histogram(run: RunFiles) -> Panel | None:
    """Return a histogram of the test episodes; None where there are too few for one."""
    results = run.results
    if results is None or results["metric"] not in run.arrays:
        return None
    metric = str(results["metric"])
    scale, label = unit(metric)
    every = scale * np.asarray(run.arrays[metric], dtype=np.float64)
    values = every[np.isfinite(every)]
    if len(values) < _FEWEST:
        return None
    figure = Figure(figsize=SIZE)
    axes = figure.add_subplot()
    edges = _edges(values, metric, run.config)
    # Outlying errors are counted in the last bin.
    inside = np.clip(values, None, edges[-1])
    counts, _, _ = axes.hist(inside, bins=edges, color=run.color, alpha=0.85)
    mean, ci95 = interval(values)
    axes.axvline(mean, color=INK, linewidth=1.4)
    axes.axvspan(mean - ci95, mean + ci95, color=INK, alpha=0.25, linewidth=0)
    axes.set(xlabel=label, ylabel="test episodes")
    if metric != "accuracy" and edges[0] > 0.0 and edges[-1] > _DECADES * edges[0]:
        axes.set_xscale("log")
        plain(axes.xaxis)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if metric == "accuracy":
        # The outer bins extend beyond 0 and 100 %, since they are centered there.
        axes.set_xticks([tick for tick in axes.get_xticks() if 0.0 <= tick <= scale])
    summary = _spread(values, " %" if metric == "accuracy" else "")
    far = int((values > edges[-1]).sum())
    notes = f" The last bin counts {number_of(far, 'episode')} beyond it, too." if far else ""
    if len(values) < len(every):
        left = number_of(len(every) - len(values), "episode")
        notes += f" Left out: {left} without a finite figure."
    return Panel(
        "episodes",
        "Test episodes",
        f"Histogram of {len(values)} test episodes; the line is their mean with its 95 % "
        f"interval. {summary}{notes}{_scale(run)}",
        f"Histogram of the {label} of {len(values)} test episodes. {summary}{notes}",
        figure,
        {
            "from": list(edges[:-1]),
            "to": [*edges[1:-1], max(edges[-1], float(values.max()))],
            "episodes": [int(count) for count in counts],
        },
    )


def _spread(values: Floats, sign: str) -> str:
    """Describe the spread of values in words; `sign` follows each number."""
    at = [0.05, 0.5, 0.95] if len(values) >= _FEW_EPISODES else [0.0, 0.5, 1.0]
    lowest, median, highest = (f"{value:.4g}{sign}" for value in np.quantile(values, at))
    if len(values) < _FEW_EPISODES:
        return f"They lie between {lowest} and {highest}."
    return f"Nine of ten lie between {lowest} and {highest}, the median is {median}."


def _edges(values: Floats, metric: str, config: Mapping[str, Any]) -> list[float]:
    """Return the edges of bins; for an accuracy all bins cover equally many possible values.

    An accuracy is a number of correct answers, so that other widths would give a comb pattern.
    """
    most = int(np.clip(len(values) / 4, 5, _MOST_BINS))
    numbers = config["way"], config["query"]
    if metric == "accuracy" and not config.get("sizes") and not any(map(varies, numbers)):
        answer = 100.0 / (int(str(config["way"])) * int(str(config["query"])))
        low = int(np.round(values.min() / answer))
        answers = int(np.round(values.max() / answer)) - low + 1
        each = -(-answers // most)
        count = -(-answers // each)
        return [float((low - 0.5 + k * each) * answer) for k in range(count + 1)]
    low_end, high_end = float(values.min()), float(np.quantile(values, 0.995))
    if not high_end > low_end:
        high_end = low_end + max(abs(low_end), 1.0) * 0.1
    if high_end > _DECADES * low_end > 0.0:
        return list(map(float, np.geomspace(low_end, high_end, 1 + most)))
    return list(map(float, np.linspace(low_end, high_end, 1 + most)))


def _ends(values: Floats, metric: str) -> str:
    here = values[np.isfinite(values)]
    if not len(here):
        return "no finite value"
    return f"from {shown(metric, here[0])} to {shown(metric, here[-1])}"
