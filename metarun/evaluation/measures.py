"""Measures: one value for each test episode, computed from an algorithm's answers.

A measure is one entry: its description, and the function that computes it. `@measure` makes one.

    @measure("margin", "margin of the best class", unit="%", better="higher")
    def margin(answers: Answers) -> Tensor | None:
        best = answers.probabilities.topk(2).values
        return (best[..., 0] - best[..., 1]).mean(1)

`BUILT_IN` lists those that every meta-test computes; `eval.measures=[module.margin]` adds a user's.
Results, tables, report and trackers take it from there.

Shapes: T tasks, Q query rows, W ways, D outputs, N episodes, B bins.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributions import Normal

from metarun.algorithms.base import task_metric
from metarun.core.measures import (
    COVERAGE,
    LOG_LIKELIHOOD,
    WITHOUT_DESCRIPTION,
    Better,
    Measure,
)
from metarun.core.statistics import NORMAL_95, Floats, interval_record, pseudo_values
from metarun.core.types import EpisodeSource, Prediction, Record, TaskBatch, TaskSpec

BINS = 15
"""Bins of the calibration error, as in Guo et al. (2017)."""

_TAKEN = {
    "accuracy", "mse", "curve", "embeddings", "presentations", "families", "groups", "confusions",
    "class_names",
}  # fmt: skip
"""Other arrays of `episodes.npz`."""

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Answers:
    """What an algorithm answers to a batch of T tasks, and the true targets.

    Attributes:
        spec: Kind and shapes of the tasks.
        batch: The tasks; `batch.query_y` holds the targets.
        prediction: The algorithm's predictions for the query rows.
        temperature: Divisor of the logits.
        trace: (P, T, Q, W) logits or (P, T, Q, D) values after 0 … P - 1 inner steps; None for an
            algorithm without inner steps, or if no adaptation curve is wanted.
    """

    spec: TaskSpec
    batch: TaskBatch
    prediction: Prediction
    temperature: float = 1.0
    trace: Tensor | None = None

    @property
    def classification(self) -> bool:
        """Whether the targets are labels."""
        return self.spec.kind == "classification"

    @property
    def targets(self) -> Tensor:
        """(T, Q) labels or (T, Q, D) values of the query rows."""
        return self.batch.query_y

    @cached_property
    def log_probabilities(self) -> Tensor:
        """(T, Q, W) logarithms of `probabilities`."""
        return (self.prediction.outputs.detach().double() / self.temperature).log_softmax(-1)

    @cached_property
    def probabilities(self) -> Tensor:
        """(T, Q, W) probabilities of the classes: the softmax of the logits over temperature."""
        return self.log_probabilities.exp()

    def metric(self, outputs: Tensor) -> Tensor:
        """Return the task metric (…, T) of outputs (…, T, Q, D), in float64 for equal accuracies
        on all devices."""
        targets = self.targets if self.classification else self.targets.double()
        return task_metric(self.spec, outputs.detach().double(), targets)


@dataclass(frozen=True)
class Joined:
    """What a measurement takes from all episodes.

    Attributes:
        arrays: The tensors of `Measurement.of` of all batches, joined along their first dimension.
        values: (N,) metric of each episode.
        source: The data set.
    """

    arrays: Mapping[str, Array]
    values: Floats
    source: EpisodeSource


@dataclass(frozen=True)
class Summary:
    """What a measurement of all episodes adds to the files of a meta-test.

    Attributes:
        arrays: Entries of `episodes.npz`.
        record: Entries of `results.json`.
    """

    arrays: Mapping[str, Array]
    record: Record


class Measurement(Protocol):
    """A part of an evaluation: a measure, or one of the details in `details.py`."""

    def of(self, answers: Answers) -> Mapping[str, Tensor]:
        """Return tensors by name, to be joined over batches along their first dimension.

        The result is empty where the measurement does not apply.
        """
        ...

    def summary(self, joined: Joined) -> Summary:
        """Return the entries of the files."""
        ...


@dataclass(frozen=True)
class MeasureEntry:
    """A measure: its description, and how it is computed.

    Attributes:
        shown: Its description, which `results.json` holds as well.
        compute: Function that returns the (T,) values of a batch, or (T, …) sums for `pooled`;
            None where the measure does not apply.
        pooled: Function of the pooled sums (…), for a measure that is no mean over episodes. Its
            interval is then that of the jackknife over episodes.
    """

    shown: Measure
    compute: Callable[[Answers], Tensor | None]
    pooled: Callable[[Floats], Floats] | None = None

    def __call__(self, answers: Answers) -> Tensor | None:
        """Return what `compute` returns."""
        return self.compute(answers)

    def of(self, answers: Answers) -> Mapping[str, Tensor]:
        """Return the tensor of a batch under the name of the measure."""
        found = self(answers)
        if found is None:
            return {}
        tasks = answers.batch.num_tasks
        if found.shape[:1] != (tasks,) or (found.ndim > 1 and self.pooled is None):
            raise ValueError(
                f"the measure {self.shown.name} has values of shape {tuple(found.shape)}: expected "
                f"one for each of the {tasks} tasks"
            )
        return {self.shown.name: found.double()}

    def summary(self, joined: Joined) -> Summary:
        """Return the values of the episodes, and their mean with its interval."""
        name, own = self.shown.name, joined.arrays[self.shown.name]
        own = own if self.pooled is None else pseudo_values(own, self.pooled)
        found = interval_record(own)
        record = {"measures": {name: {**found, **self.shown.stored()}}}
        # Earlier versions wrote these two beside the metric.
        return Summary({name: own}, record | ({name: found} if name in WITHOUT_DESCRIPTION else {}))


def measure(
    name: str,
    title: str,
    *,
    unit: str = "",
    better: Better | None = None,
    places: int | None = None,
    by_default: bool = False,
    about: str = "",
    pooled: Callable[[Floats], Floats] | None = None,
) -> Callable[[Callable[[Answers], Tensor | None]], MeasureEntry]:
    """Make a measure of a function of `Answers`.

    Args:
        name, title, unit, better, places, by_default, about: See `core.measures.Measure`.
        pooled: See `MeasureEntry`.
    """
    return partial(
        MeasureEntry,
        Measure(name, title, unit, better, places, by_default, about),
        pooled=pooled,
    )


# Of regressions with a predicted standard deviation. Arguments of `Normal` are not validated: a
# diverged model gives a value that is not finite, not an exception.


@partial(MeasureEntry, LOG_LIKELIHOOD)
def log_likelihood(answers: Answers) -> Tensor | None:
    """Return the mean log-density (T,) of the targets under the predicted normal distributions."""
    spread = answers.prediction.spread
    if spread is None:
        return None
    normal = Normal(answers.prediction.outputs.double(), spread.double(), validate_args=False)
    density: Tensor = normal.log_prob(answers.targets.double())
    return density.mean((1, 2))


@partial(MeasureEntry, COVERAGE)
def coverage(answers: Answers) -> Tensor | None:
    """Return the share (T,) of the targets within 1.96 standard deviations of the mean."""
    mean, spread = answers.prediction.outputs.double(), answers.prediction.spread
    if spread is None:
        return None
    covered = (answers.targets.double() - mean).abs() <= NORMAL_95 * spread.double()
    return covered.double().mean((1, 2))


# Of classifiers.


@measure(
    "nll",
    "negative log-likelihood",
    unit="nats",
    better="lower",
    places=3,
    about="Mean of -log p(label) over the queries of an episode.",
)
def nll(answers: Answers) -> Tensor | None:
    """Return the mean of -log p(label) over the queries, (T,)."""
    if not answers.classification:
        return None
    right: Tensor = answers.log_probabilities.gather(2, answers.targets[..., None])
    return -right.mean((1, 2))


def _calibration_error(bins: Floats) -> Floats:
    """Return sum_b |right - confidence| / queries of (…, B, 3) sums; see `ece`."""
    queries, confidence, right = np.moveaxis(bins, -1, 0)
    error: Floats = np.abs(right - confidence).sum(-1) / queries.sum(-1)
    return error


@measure(
    "ece",
    "expected calibration error",
    unit="%",
    better="lower",
    places=1,
    about="Gap of confidence and accuracy in 15 equal bins of confidence over all queries "
    "(Guo et al. 2017, eq. 3); its interval is the jackknife's over episodes. Even a calibrated "
    "classifier is above 0 on a finite number of queries.",
    pooled=_calibration_error,
)
def ece(answers: Answers) -> Tensor | None:
    """Return the number, summed confidence and right answers of the queries by bin, (T, B, 3).

    Bin b holds the queries with a confidence, the greatest probability, in (b / B, (b + 1) / B].
    """
    if not answers.classification:
        return None
    confidence, chosen = answers.probabilities.max(-1)
    right = (chosen == answers.targets).double()
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    inside = torch.nn.functional.one_hot(place, BINS).double()
    rows = torch.stack([torch.ones_like(right), confidence, right], -1)
    return inside.transpose(1, 2) @ rows


BUILT_IN: tuple[MeasureEntry, ...] = (log_likelihood, coverage, nll, ece)


def chosen(names: Sequence[str]) -> tuple[MeasureEntry, ...]:
    """Return the built-in measures and those of a user by their dotted names.

    Raises:
        ValueError: A name is not that of a measure, or two measures have the same name.
    """
    found = list(BUILT_IN)
    for path in names:
        module, _, name = path.rpartition(".")
        entry = getattr(importlib.import_module(module), name, None) if module else None
        if not isinstance(entry, MeasureEntry):
            raise ValueError(
                f"eval.measures: {path} is no measure: expected a function with the decorator "
                "@measure of metarun.evaluation.measures"
            )
        own = entry.shown.name
        if own in _TAKEN or own in {other.shown.name for other in found} or not own.isidentifier():
            raise ValueError(f"eval.measures: {path} has the name {own}, which is taken: rename it")
        found.append(entry)
    return tuple(found)


def as_array(values: Tensor) -> Floats:
    """Return a tensor as a float64 array."""
    return np.asarray(values.cpu().numpy(), dtype=np.float64)
