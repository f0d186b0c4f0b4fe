"""Metrics of each episode, and a hash of the episodes.

Shapes: T tasks, S support rows, Q query rows, W ways, D outputs, N episodes, P points of the
adaptation curve, E dimensions of an embedding, K presentations of a class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal

from metarun.algorithms.base import task_metric
from metarun.core.statistics import NORMAL_95, Floats
from metarun.core.types import Prediction, TaskBatch, TaskSpec
from metarun.evaluation.task_clusters import Labels

Digest = Any
"""A hashlib object; hashlib has no public type for it."""


@dataclass(frozen=True, slots=True)
class EpisodeMetrics:
    """The metrics of every episode.

    Attributes:
        values: (N,) accuracy as a fraction, or mean squared error over query rows and outputs.
        curve: (P, N) the same metric after 0 … P - 1 inner steps; None if it was not computed or
            the algorithm does not adapt in steps.
        embeddings: (N, E) vector that the algorithm computes for each task; None if it has none.
        presentations: (N, K) accuracy at the first to the K-th presentation of a class along the
            support; None if the algorithm gives no predictions along it.
        extra: (N,) arrays by name, if predictions have a standard deviation: `log_likelihood` of
            the targets under the predicted normal distributions, and `coverage`, the share of
            targets within 1.96 standard deviations of the mean.
        families: (N,) index of each task's family of functions; None if there is only one family.
        groups: (N,) the component with the greatest responsibility for each task; None if the
            algorithm is not a mixture.
        strategies: (N,) metric of each base-learner that the algorithm chose among, by name.
        alternatives: (N,) metric of other rules that choose or combine base-learners, by name.
        confusions: (M, 3) true data-set class, predicted class and number of queries, for each of
            M pairs; None if a label does not stand for a single class.
        digest: Hash of the episodes: equal for equal episodes, whatever the batch size.
        stream_record: (N, …) measurements along the streams by name, as in `Rollouts.measured`
            and `Rollouts.untrained`; None if tasks are not streams.
    """

    values: Floats
    curve: Floats | None
    embeddings: Floats | None
    digest: str
    stream_record: Mapping[str, Floats] | None = None
    presentations: Floats | None = None
    extra: Mapping[str, Floats] = field(default_factory=dict)
    families: Labels | None = None
    groups: Labels | None = None
    strategies: Mapping[str, Floats] = field(default_factory=dict)
    alternatives: Mapping[str, Floats] = field(default_factory=dict)
    confusions: Labels | None = None


def by_presentation(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the accuracy (T, K) at the first to the K-th presentation of a class.

    Santoro et al. (2016) report these.

    Args:
        outputs: (T, S, W) predictions along a sequence, each given the labels of earlier rows.
        labels: (T, S) labels, each class K times.
    """
    same = labels[:, :, None] == labels[:, None]
    presentation = same.tril(-1).sum(2)
    right = (outputs.argmax(2) == labels).double()
    times = torch.arange(int(presentation.max()) + 1, device=labels.device)
    at = (presentation[:, None] == times[:, None]).double()
    return (at * right[:, None]).sum(2) / at.sum(2)


def uncertainty_metrics(answer: Prediction, targets: Tensor) -> dict[str, Tensor]:
    """Return the metrics (T,) by name of predictions with a spread; see `EpisodeMetrics.extra`.

    Args:
        answer: Prediction with means and standard deviations (T, Q, D).
        targets: (T, Q, D) true values.
    """
    assert answer.spread is not None
    mean, spread, targets = answer.outputs.double(), answer.spread.double(), targets.double()
    # Arguments are not validated: a diverged model gives a non-finite metric, not an exception.
    normal = Normal(mean, spread, validate_args=False)
    covered = (targets - mean).abs() <= NORMAL_95 * spread
    return {
        "log_likelihood": normal.log_prob(targets).mean((1, 2)),
        "coverage": covered.double().mean((1, 2)),
    }


def metric_values(spec: TaskSpec, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the task metric (T,) in float64, so that accuracies are equal on all devices."""
    targets = targets if spec.kind == "classification" else targets.double()
    return task_metric(spec, outputs.detach().double(), targets)


def as_array(values: Tensor) -> Floats:
    """Return a tensor as a float64 array."""
    return np.asarray(values.cpu().numpy(), dtype=np.float64)


def add_to_digest(digest: Digest, batch: TaskBatch) -> None:
    """Add a batch to a hash: all labels, and about 64 values of each input row.

    Hashing whole images would take seconds.
    """
    parts = [batch.support_y, batch.query_y]
    parts += [] if batch.class_ids is None else [batch.class_ids]
    for inputs in (batch.support_x, batch.query_x):
        rows = inputs.flatten(2)
        parts.append(rows[..., :: max(1, rows.shape[-1] // 64)])
    arrays = [part.cpu().numpy() for part in parts]
    # Task by task, so that the hash does not depend on the batch size.
    for task in range(batch.num_tasks):
        for array in arrays:
            digest.update(array[task].tobytes())
