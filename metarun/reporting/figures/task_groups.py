"""Tasks as points, and their families and mixture components.

Shapes: N test tasks, E embedding dimensions, J families, K components.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from metarun.core.statistics import Floats
from metarun.evaluation.episodes import tasks_alike
from metarun.reporting.figures import adaptation
from metarun.reporting.figures.drawing import COLORS, INK, SIZE, Panel, Series
from metarun.reporting.figures.tasks import Learned, answer
from metarun.reporting.run_files import RunFiles

_SHARED_TASKS = 40
_DARK = 0.6


def panels(run: RunFiles, learned: Learned | None) -> list[Panel]:
    """Return figures of test tasks as points, of their families and of responsibilities."""
    made = [*_points(run, learned), *_families(run)]
    if learned is not None and "groups" in run.arrays:
        made += _responsibilities(learned)
    return made


def _points(run: RunFiles, learned: Learned | None) -> list[Panel]:
    arrays, metric = run.arrays, run.metric
    if metric is None or metric not in arrays:
        return []
    vectors, what = arrays.get("embeddings"), "the learner's embedding of its support"
    if vectors is None or vectors.shape[1] < 2:
        if learned is None:
            return []
        vectors = adaptation.task_vectors(learned, len(arrays[metric]))
        what = "the change of the parameters in adaptation"
        if vectors is None:
            vectors = adaptation.support_vectors(learned, len(arrays[metric]))
            what = "the mean of its support's features"
    if vectors is None or not np.isfinite(vectors).all():
        return []
    points = adaptation.principal(vectors)
    if "families" in arrays:
        families = arrays["families"][: len(points)]
        return [adaptation.embedded(points, families, "family", what, _names(run, families))]
    hue, label = _hue(run, learned, len(points))
    return [adaptation.embedded(points, hue, label, what)]


def _names(run: RunFiles, families: Any) -> list[str]:
    """Return the names of the families of functions."""
    found = run.config["data"].get("families") or range(int(families.max()) + 1)
    return list(map(str, found))


def _hue(run: RunFiles, learned: Learned | None, tasks: int) -> tuple[Floats, str]:
    """Return a number for each task's color, with its name.

    It is the first parameter of the task's function if known, else the task's figure.
    """
    names = getattr(learned.source, "parameter_names", ()) if learned is not None else ()
    if names and learned is not None:
        values = learned.source.parameters("test", 0, tasks)[0]  # type: ignore[attr-defined]
        return np.asarray(values.cpu().numpy()), str(names[0])
    metric = str(run.metric)
    values = np.asarray(run.arrays[metric][:tasks], dtype=np.float64)
    return (100 * values, "accuracy, %") if metric == "accuracy" else (values, "squared error")


def _families(run: RunFiles) -> list[Panel]:
    """Return a heat map of the tasks of each family in each group."""
    found = None if run.results is None else run.results.get("families")
    if not found:
        return []
    counts = np.array(found["counts"])
    names = _names(run, np.arange(len(counts)))
    figure = Figure(figsize=(SIZE[0], 0.9 + 0.42 * len(counts)))
    axes = figure.add_subplot()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if share[row, column] > _DARK else "black"
        axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=8)
    axes.set_yticks(range(len(counts)), names[: len(counts)])
    axes.set_xticks(range(counts.shape[1]), [str(k + 1) for k in range(counts.shape[1])])
    axes.set(xlabel="group of tasks")
    axes.grid(visible=False)
    summary = f"adjusted Rand index {found['adjusted_rand_index']:.2f}, by {found['by']}"
    return [
        Panel(
            "families",
            "Families found",
            f"Number of test tasks of each family in each group found: {summary}.",
            f"A table of families against groups of tasks; {summary}.",
            figure,
            {
                "family": [names[j] for j, _ in np.ndindex(*counts.shape)],
                "group": [k + 1 for _, k in np.ndindex(*counts.shape)],
                "tasks": [int(count) for count in counts.reshape(-1)],
            },
        )
    ]


def _responsibilities(learned: Learned) -> list[Panel]:
    """Return a figure of each component's share in some test tasks, sorted by family."""
    batch = tasks_alike(learned.source, "test", _SHARED_TASKS)
    found = answer(learned, batch, batch.query_x, 0).responsibilities
    if found is None:
        return []
    shares = found.cpu().double().numpy()
    family = np.zeros(len(shares), dtype=np.int64)
    if batch.class_ids is not None:
        family = batch.class_ids[:, 0].cpu().numpy()
    order = np.lexsort((-shares.max(1), shares.argmax(1), family))
    figure = Figure(figsize=SIZE)
    axes = figure.add_subplot()
    series: dict[str, Series] = {}
    places, under = np.arange(len(shares)), np.zeros(len(shares))
    for component in range(shares.shape[1]):
        color, key = COLORS[component % len(COLORS)], f"component{component}"
        bars = axes.bar(places, shares[order, component], bottom=under, color=color, width=0.9)
        for place, bar in enumerate(bars):
            bar.set_gid(f"{key}-{place}")
        under = under + shares[order, component]
        series[key] = Series(f"component {component + 1}", color, marker="s")
    for border in np.nonzero(np.diff(family[order]))[0]:
        axes.axvline(border + 0.5, color=INK, linewidth=1.6)
    sure = float((shares.max(1) > 0.9).mean())
    axes.set(xlabel="test task", ylabel="responsibility", ylim=(0, 1))
    axes.grid(visible=False)
    return [
        Panel(
            "responsibilities",
            "Responsibilities",
            f"Share of each component in {len(shares)} test tasks, one bar per task; lines "
            f"separate families. In {100 * sure:.0f} % of the tasks one share exceeds 0.9.",
            f"Stacked bars of {shares.shape[1]} components' shares in {len(shares)} tasks.",
            figure,
            {
                "task": [int(task) for task in order],
                "family": [int(number) for number in family[order]],
                **{
                    f"component {k + 1}": list(map(float, shares[order, k]))
                    for k in range(shares.shape[1])
                },
            },
            series,
        )
    ]
