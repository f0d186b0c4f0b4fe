"""Meta-validation: the metric on meta-val, and the option of an algorithm that is best on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from metarun.algorithms.base import Algorithm
from metarun.algorithms.capabilities import HasOptions
from metarun.core.console import Screen
from metarun.core.measures import figure
from metarun.core.settings import EvalSettings
from metarun.core.statistics import interval
from metarun.core.types import EpisodeSource
from metarun.evaluation.on_split import meta_validation
from metarun.training.signals import Signals, ticker

_LONG = 60.0
"""Seconds of an evaluation that are told beforehand."""
_SHORTER = "fewer eval.val_episodes are shorter"


@dataclass(frozen=True, slots=True)
class Validated:
    """The result of a meta-validation.

    Attributes:
        metric: Name of the metric.
        option: Values of the best option by name; empty if the algorithm has no options.
        mean, ci95: Mean metric and the half-width of its 95 % interval over episodes.
        episodes: Number of episodes.
        higher_is_better: Whether a higher mean is better.
    """

    metric: str
    option: Mapping[str, float]
    mean: float
    ci95: float
    episodes: int
    higher_is_better: bool

    def figures(self) -> dict[str, float]:
        """Return the mean, its interval and the number of episodes."""
        return {"mean": self.mean, "ci95": self.ci95, "episodes": self.episodes}

    def line(self) -> dict[str, float]:
        """Return the metrics of a line of `metrics.jsonl`."""
        named = {self.metric: self.mean, f"{self.metric}_ci95": self.ci95, **self.option}
        return {f"val/{name}": value for name, value in named.items()}

    def better_than(self, before: float | None) -> bool:
        """Return whether the mean is finite and better than a previous one, if there is one."""
        if before is None or not math.isfinite(self.mean) or not math.isfinite(before):
            return math.isfinite(self.mean)
        return self.mean > before if self.higher_is_better else self.mean < before

    def __str__(self) -> str:
        options = "".join(f", {name} {value:g}" for name, value in self.option.items())
        value = figure(self.metric, self.mean, self.ci95)
        return f"val {self.metric} {value} ({self.episodes} episodes{options})"


def validate(
    algorithm: Algorithm,
    source: EpisodeSource,
    evaluation: EvalSettings,
    screen: Screen,
    signals: Signals,
    *,
    first: bool = False,
) -> Validated:
    """Evaluate an algorithm on meta-val with each of its options, and set the best one.

    The first of a run says beforehand if it takes long.
    """
    spec = source.spec
    best: Validated | None = None
    tuned = algorithm if isinstance(algorithm, HasOptions) else None
    for option in (tuned and tuned.options) or [{}]:
        if tuned is not None:
            tuned.choose(option)
        here = meta_validation(algorithm, source, evaluation)
        long = _LONG if first and best is None else math.inf
        with screen.bar("val", here.size, long=long, shorter=_SHORTER) as bar:
            mean, ci95 = interval(here.run(ticker(bar, signals)).values)
        found = Validated(
            spec.metric, option, mean, ci95, evaluation.val_episodes, spec.higher_is_better
        )
        if best is None or found.better_than(best.mean):
            best = found
    assert best is not None
    if tuned is not None:
        tuned.choose(best.option)
    return best
