"""The temperature of a classifier, fitted on meta-val (Guo et al. 2017, section 4.2).

Shapes: N episodes, T tasks, Q query rows, W ways.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
from torch import Tensor
from torch.nn.functional import pad

from metarun.algorithms.base import Algorithm
from metarun.core.settings import EvalSettings
from metarun.core.statistics import Floats, quiet
from metarun.core.types import EpisodeSource
from metarun.evaluation.episodes import EpisodeEvaluation
from metarun.evaluation.evaluation import Tick
from metarun.evaluation.measures import Answers, Array, Joined, Summary

LARGEST = 1e4
"""Temperatures are between this and its inverse."""

_HALVINGS = 60
_ABSENT = -1e30
_log = logging.getLogger(__name__)


class _Logits:
    """The logits and labels of all queries."""

    def of(self, answers: Answers) -> Mapping[str, Tensor]:
        """Return logits (T Q, W) and labels (T Q,), with absent classes far below the others."""
        logits = answers.prediction.outputs.double().flatten(0, 1)
        absent = answers.spec.output_dim - logits.shape[1]
        filled = pad(logits, (0, max(absent, 0)), value=_ABSENT)
        return {"logits": filled, "labels": answers.targets.flatten()}

    def summary(self, joined: Joined) -> Summary:
        """Return them as arrays."""
        return Summary(joined.arrays, {})


def fit_temperature(
    algorithm: Algorithm, source: EpisodeSource, settings: EvalSettings, tick: Tick | None = None
) -> float:
    """Return the temperature with the least negative log-likelihood on the episodes of meta-val.

    Predictions are averaged over `settings.views`, as at meta-test. The temperature is 1, with a
    warning, if a logit is not finite.
    """
    evaluated = EpisodeEvaluation(
        algorithm,
        source,
        "val",
        settings.val_episodes,
        settings.tasks_per_batch,
        views=settings.views,
        measurements=[_Logits()],
    ).run(tick)
    logits, labels = evaluated.arrays["logits"], evaluated.arrays["labels"]
    if not np.isfinite(logits).all():
        _log.warning("eval.temperature=val: a logit on meta-val is not finite: 1 is used")
        return 1.0
    return best_temperature(logits, labels)


@quiet
def best_temperature(logits: Floats, labels: Array) -> float:
    """Return the temperature t that minimizes the mean cross-entropy of logits / t.

    The cross-entropy is convex in b = 1 / t. Its derivative, the mean over rows of the expected
    minus the true logit under softmax(b logits), rises with b, so bisection finds its zero.

    Args:
        logits: (N, W) finite logits.
        labels: (N,) true classes.
    """
    logits = logits - logits.max(1, keepdims=True)
    true = logits[np.arange(len(labels)), labels]

    def slope(inverse: float) -> float:
        weights = np.exp(inverse * logits)
        expected = (weights * logits).sum(1) / weights.sum(1)
        return float((expected - true).mean())

    # Logarithms, since temperatures may differ by orders of magnitude.
    low, high = -np.log(LARGEST), np.log(LARGEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if slope(np.exp(middle)) < 0.0 else (low, middle)
    return float(np.exp(-(low + high) / 2.0))
