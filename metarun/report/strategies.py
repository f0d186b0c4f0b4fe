"""The ways of learning that a learner chooses among, against the one that chose."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from metarun.report.curves import unit
from metarun.report.drawing import INK, SIZE, Panel
from metarun.report.files import RunFiles


def panels(run: RunFiles) -> list[Panel]:
    """How much better the learner is than each strategy; none where it chooses among none."""
    results = run.results
    if results is None or not results.get("strategies"):
        return []
    scale, label = unit(str(results["metric"]))
    found = results["strategies"]
    names = sorted(found, key=lambda name: -_number(found[name]["gain"]["mean"]))
    gain, width, mean, ci95 = (
        scale * np.array([_number(place[key]) for place in places])
        for places, key in (
            ([found[name]["gain"] for name in names], "mean"),
            ([found[name]["gain"] for name in names], "ci95"),
            ([found[name] for name in names], "mean"),
            ([found[name] for name in names], "ci95"),
        )
    )
    figure = Figure(figsize=(SIZE[0], 0.9 + 0.24 * len(names)))
    axes = figure.add_subplot()
    places = np.arange(len(names))[::-1]
    axes.errorbar(gain, places, xerr=width, fmt="o", color=run.colour, markersize=4, linewidth=1.2)
    axes.axvline(0.0, color=INK, linewidth=1.2)
    axes.set_yticks(places, names, fontsize=8)
    axes.set(xlabel=f"{results['algo']} is better by ({label})", ylim=(-0.7, len(names) - 0.3))
    axes.grid(visible=False, axis="y")
    beaten = sum(g - w > 0 for g, w in zip(gain, width, strict=True))
    told = f"it beats {beaten} of {len(names)} beyond the interval"
    return [
        Panel(
            "strategies",
            "Ways of learning",
            "How much better it is than each of its ways of learning on the same test tasks, "
            f"paired, with the 95 % interval: {told}. `oracle` is the best of each task.",
            f"Paired gains over {len(names)} strategies: {told}.",
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


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
