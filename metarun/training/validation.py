"""Meta-validation: the figure on meta-val, and the option that an algorithm takes by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from metarun.algorithms.base import Algorithm
from metarun.core.console import Screen
from metarun.core.settings import EvalSettings
from metarun.core.statistics import interval
from metarun.core.types import EpisodeSource
from metarun.evaluation.episodes import evaluate
from metarun.training.signals import Signals, ticker


@dataclass(frozen=True, slots=True)
class Validated:
    """What an algorithm reaches on meta-val.

    Attributes:
        option: What it chose among its options, by name; empty where it has none.
        mean, ci95: The figure and the half-width of its 95 % interval over episodes.
    """

    option: Mapping[str, float]
    mean: float
    ci95: float


def validate(
    algorithm: Algorithm,
    source: EpisodeSource,
    evaluation: EvalSettings,
    screen: Screen,
    signals: Signals,
) -> Validated:
    """Evaluate an algorithm on meta-val with each of its options; it takes the best of them."""
    best: Validated | None = None
    for option in algorithm.options or [{}]:
        algorithm.choose(option)
        with screen.bar("val", evaluation.val_episodes) as bar:
            measured = evaluate(
                algorithm,
                source,
                "val",
                evaluation.val_episodes,
                evaluation.tasks_per_batch,
                tick=ticker(bar, signals),
            )
        mean, ci95 = interval(measured.values)
        if best is None or is_better(mean, best.mean, higher=source.spec.higher_is_better):
            best = Validated(option, mean, ci95)
    assert best is not None
    algorithm.choose(best.option)
    return best


def is_better(mean: float, before: float | None, *, higher: bool) -> bool:
    """Whether a figure is finite and better than one before, where there is one."""
    if before is None or not math.isfinite(mean) or not math.isfinite(before):
        return math.isfinite(mean)
    return mean > before if higher else mean < before
