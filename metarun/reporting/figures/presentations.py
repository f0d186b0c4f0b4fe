"""Accuracy at the first, second, … presentation of a class, for memory-based learners."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metarun.core.sizes import chance
from metarun.reporting.figures.drawing import MUTED, SIZE, Panel, band
from metarun.reporting.run_files import RunFiles


def panels(run: RunFiles) -> list[Panel]:
    """Return the curve by presentation; none if the learner does not answer along a sequence."""
    results = run.results
    if results is None or "presentations" not in results:
        return []
    figures = results["presentations"]
    mean, ci95 = (
        100.0 * np.array([f[key] for f in figures], dtype=float) for key in ("mean", "ci95")
    )
    times = np.arange(1, len(figures) + 1)
    figure = Figure(figsize=SIZE)
    axes = figure.add_subplot()
    axes.plot(times, mean, "o-", color=run.color, linewidth=1.5, label=results["algo"])
    band(axes, times, mean, ci95, run.color, "curve")
    guessing = 100.0 * chance(results["way"])
    axes.axhline(guessing, color=MUTED, linestyle=":", linewidth=1.2, label="chance")
    axes.set(
        xlabel="presentation of a class",
        ylabel="accuracy, %",
        ylim=(0, 100),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right")
    summary = f"from {mean[0]:.1f} % at the first to {mean[-1]:.1f} % at the {len(mean)}th"
    return [
        Panel(
            "presentations",
            "Presentations",
            "Accuracy at the first, second, … presentation of a class along the support, before "
            f"its label is revealed: {summary}. The band is the 95 % interval.",
            f"Accuracy against the presentation of a class: {summary}; chance is {guessing:.0f} %.",
            figure,
            {
                "presentation": [int(time) for time in times],
                "accuracy, %": list(map(float, mean)),
                "ci95": list(map(float, ci95)),
            },
        )
    ]
