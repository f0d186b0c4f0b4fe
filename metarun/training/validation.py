"""Meta-validation: the metric on meta-val, and the option of an algorithm that is best on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from metarun.algorithms.base import Algorithm
from metarun.algorithms.capabilities import HasOptions
from metarun.core.console import Screen
from metarun.core.settings import EvalSettings
from metarun.core.statistics import interval
from metarun.core.types import EpisodeSource
from metarun.evaluation.episodes import evaluate
from metarun.training.signals import Signals, ticker


@dataclass(frozen=True, slots=True)
class Validated:
    """The result of a meta-validation.

    Attributes:
        option: Values of the best option by name; empty if the algorithm has no options.
        mean, ci95: Mean metric and the half-width of its 95 % interval over episodes.
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
    """Evaluate an algorithm on meta-val with each of its options, and set the best one."""
    best: Validated | None = None
    tuned = algorithm if isinstance(algorithm, HasOptions) else None
    for option in (tuned and tuned.options) or [{}]:
        if tuned is not None:
            tuned.choose(option)
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
    if tuned is not None:
        tuned.choose(best.option)
    return best


def is_better(mean: float, before: float | None, *, higher: bool) -> bool:
    """Return whether a mean is finite and better than the previous one, if there is one."""
    if before is None or not math.isfinite(mean) or not math.isfinite(before):
        return math.isfinite(mean)
    return mean > before if higher else mean < before
