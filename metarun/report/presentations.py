"""Accuracy at the first, second, … presentation of a class, of a learner that remembers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metarun.report.drawing import COLOURS, STYLE, save, title


def draw(folder: Path) -> list[Path]:
    """Write `figures/presentations`, as PNG and SVG.

    Args:
        folder: Of a run or of a test whose `results.json` has `presentations`.

    Returns:
        The files.
    """
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    with rc_context(STYLE):
        return save(folder / "figures", "presentations", _curve(results))


def _curve(results: Mapping[str, Any]) -> Figure:
    figures = results["presentations"]
    mean, ci95 = (
        100.0 * np.array([f[key] for f in figures], dtype=float) for key in ("mean", "ci95")
    )
    times = np.arange(1, len(figures) + 1)
    figure = Figure(figsize=(6.4, 4.0))
    axes = figure.add_subplot()
    axes.plot(times, mean, "o-", color=COLOURS[0], linewidth=1.5, label=results["algo"])
    axes.fill_between(times, mean - ci95, mean + ci95, color=COLOURS[0], alpha=0.2, linewidth=0)
    chance = 100.0 / results["way"]
    axes.axhline(chance, color="#777777", linestyle=":", linewidth=1.0, label="chance")
    axes.set(
        title=title(results),
        xlabel="presentation of a class",
        ylabel="accuracy, %",
        ylim=(0, 100),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="lower right")
    return figure
