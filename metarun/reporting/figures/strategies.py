"""Comparison of a selector with each of the strategies that it selects from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from metarun.core.statistics import Floats
from metarun.reporting.figures.curves import unit
from metarun.reporting.figures.drawing import INK, Panel, named_rows
from metarun.reporting.run_files import RunFiles


def panels(run: RunFiles) -> list[Panel]:
    """Return a figure of the learner's gain over each strategy; none without strategies."""
    results = run.results
    if results is None or not results.get("strategies"):
        return []
    scale, label = unit(str(results["metric"]))
    found = results["strategies"]
    gains = {name: place["gain"] for name, place in found.items()}
    # Values that are not finite are null in the file, and NaN in an array of floats.
    order = np.argsort(-_column(gains, "mean"), kind="stable")
    names = [list(found)[place] for place in order]
    gain, width = (scale * _column(gains, key)[order] for key in ("mean", "ci95"))
    mean, ci95 = (scale * _column(found, key)[order] for key in ("mean", "ci95"))
    figure, axes, places = named_rows(names, 0.24, fontsize=8)
    axes.errorbar(gain, places, xerr=width, fmt="o", color=run.color, markersize=4, linewidth=1.2)
    axes.axvline(0.0, color=INK, linewidth=1.2)
    axes.set(xlabel=f"gain of {results['algo']} ({label})")
    beaten = sum(g - w > 0 for g, w in zip(gain, width, strict=True))
    summary = f"the gain over {beaten} of {len(names)} is above zero beyond its interval"
    return [
        Panel(
            "strategies",
            "Strategies",
            "Paired gain over each strategy alone on the same test tasks, with the 95 % "
            f"interval: {summary}. `oracle` uses the best strategy of each task.",
            f"Paired gains over {len(names)} strategies: {summary}.",
            figure,
            {
                "strategy": names,
                label: list(map(float, mean)),
                "ci95": list(map(float, ci95)),
                "gain": list(map(float, gain)),
                "gain ci95": list(map(float, width)),
            },
        )
    ]


def _column(places: Mapping[str, Mapping[str, Any]], key: str) -> Floats:
    return np.array([place[key] for place in places.values()], dtype=np.float64)
