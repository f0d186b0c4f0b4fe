"""Accuracy and confusions of classes over all test episodes of a run.

Shapes: C test classes, P pairs of a true class and a predicted class.
"""

from __future__ import annotations

import numpy as np
from matplotlib.ticker import MaxNLocator

from metarun.core.statistics import Floats
from metarun.reporting.figures.drawing import INK, WRONG, Panel, named_rows
from metarun.reporting.run_files import RunFiles

_NAMED = 12
"""Number of classes, and of pairs of classes, that are shown by name."""
_LETTERS = 34


def panels(run: RunFiles) -> list[Panel]:
    """Return figures of each class's accuracy and of confused pairs; none without counts."""
    if "confusions" not in run.arrays:
        return []
    pairs = run.arrays["confusions"]
    names = [str(name) for name in run.arrays.get("class_names", [])]
    if not names:
        names = [f"class {number}" for number in range(int(pairs[:, :2].max()) + 1)]
    return [by_class(pairs, names, run.color), *confused(pairs, names)]


def by_class(pairs: Floats, names: list[str], color: str) -> Panel:
    """Return a figure of each class's accuracy, the worst first."""
    classes = np.unique(pairs[:, 0])
    asked = np.array([pairs[pairs[:, 0] == c, 2].sum() for c in classes])
    right = np.array([pairs[(pairs[:, 0] == c) & (pairs[:, 1] == c), 2].sum() for c in classes])
    share = right / asked
    order = np.argsort(share, kind="stable")
    shown = order if len(order) <= 2 * _NAMED else np.r_[order[:_NAMED], order[-_NAMED:]]
    figure, axes, places = named_rows([_short(names[int(classes[c])]) for c in shown], 0.17)
    axes.barh(places, 100 * share[shown], color=color, alpha=0.85, height=0.7)
    axes.set(xlabel="queries classified correctly, %", xlim=(0, 100))
    some = "" if len(shown) == len(order) else f", the {_NAMED} worst and the {_NAMED} best"
    if some:
        axes.axhline(_NAMED - 0.5, color=INK, linewidth=1.0, linestyle=":")
    worst, best = order[0], order[-1]
    summary = f"all have {100 * share[best]:.1f} %"
    if share[worst] < share[best]:
        summary = (
            f"{names[int(classes[worst])]} is hardest ({100 * share[worst]:.1f} %), "
            f"{names[int(classes[best])]} easiest ({100 * share[best]:.1f} %)"
        )
    return Panel(
        "classes",
        "Classes",
        f"Accuracy over all test episodes, of {len(order)} test classes{some}: {summary}.",
        f"Accuracy by class: {summary}.",
        figure,
        {
            "class": [names[int(classes[c])] for c in order],
            "accuracy": [float(share[c]) for c in order],
            "queries": [int(asked[c]) for c in order],
        },
    )


def confused(pairs: Floats, names: list[str]) -> list[Panel]:
    """Return a figure of the most confused pairs of classes; none without wrong answers."""
    wrong = pairs[pairs[:, 0] != pairs[:, 1]]
    if not len(wrong):
        return []
    asked = {int(c): pairs[pairs[:, 0] == c, 2].sum() for c in np.unique(pairs[:, 0])}
    order = np.argsort(-wrong[:, 2], kind="stable")
    ordered = [(int(true), int(said), int(count)) for true, said, count in wrong[order]]
    shown = ordered[:_NAMED]
    labels = [f"{_short(names[true])}\nas {_short(names[said])}" for true, said, _ in shown]
    figure, axes, places = named_rows(labels, 0.33)
    axes.barh(places, [count for *_, count in shown], color=WRONG, alpha=0.85, height=0.7)
    axes.set(xlabel="queries taken for the other class")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    true, said, most = ordered[0]
    summary = f"{names[true]} is taken for {names[said]} most often ({most} queries)"
    return [
        Panel(
            "confusions",
            "Confusions",
            f"A test class, and below it the class that was predicted: {summary}, of "
            f"{wrong[:, 2].sum():.0f} wrong answers in all test episodes.",
            f"Most confused pairs of a class and an answer: {summary}.",
            figure,
            {
                "class": [names[true] for true, _, _ in ordered],
                "taken for": [names[said] for _, said, _ in ordered],
                "queries": [count for *_, count in ordered],
                "share of the class": [count / asked[true] for true, _, count in ordered],
            },
        )
    ]


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :]}"
