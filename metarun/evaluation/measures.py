"""The figures of an episode, and a hash of the episodes themselves.

Shapes: T tasks, S support rows, Q query rows, W ways, D outputs, N episodes, P points of the
adaptation curve, E numbers of an embedding, K presentations of a class.
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
from metarun.core.statistics import Floats
from metarun.core.types import Prediction, TaskBatch, TaskSpec
from metarun.evaluation.task_clusters import Labels

_TWO_SIDED_95 = 1.959963984540054
"""Spreads on either side of the mean that hold 95 % of a normal."""

Digest = Any
"""A running hash of hashlib, which names no public type for it."""


@dataclass(frozen=True, slots=True)
class EpisodeMetrics:
    """The reported figure of every episode.

    Attributes:
        values: (N,) accuracy as a fraction, or mean squared error over query rows and outputs.
        curve: (P, N) the same after 0 … P - 1 inner steps; None if it was not asked for or the
            algorithm does not adapt by steps.
        embeddings: (N, E) what the algorithm made of each task; None if it makes no vector.
        presentations: (N, K) accuracy at the first to the K-th presentation of a class along the
            support; None if the algorithm does not answer along it.
        extra: (N,) each by name, where the algorithm says how sure it is: `log_likelihood` of the
            targets under normals with the answers' means and spreads, and `coverage`, the share
            of targets within 1.96 spreads of the mean.
        families: (N,) the number of the family of functions that each task is of; None where
            there is but one.
        groups: (N,) the component with the greatest responsibility for each task; None where the
            algorithm is no mixture.
        strategies: (N,) the metric by name of each way of learning that it chose among.
        alternatives: (N,) the same of other ways to choose among them, or to join them.
        confusions: (P, 3) the data-set class of queries, the class that they were taken for, and
            their number; None where a label is of no one class.
        digest: A hash of the episodes themselves: equal for equal episodes, however cut.
        stream_record: What was measured along the streams, (N, …) by name: see
            `Rollouts.measured`, and `untrained`. None where tasks are no streams.
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
    """(T, K) accuracy at the first to the K-th presentation of a class (Santoro et al. 2016).

    Args:
        outputs: (T, S, W) answers along a sequence, each given the labels of the rows before.
        labels: (T, S), each class K times.
    """
    same = labels[:, :, None] == labels[:, None]
    presentation = same.tril(-1).sum(2)
    right = (outputs.argmax(2) == labels).double()
    times = torch.arange(int(presentation.max()) + 1, device=labels.device)
    at = (presentation[:, None] == times[:, None]).double()
    return (at * right[:, None]).sum(2) / at.sum(2)


def uncertainty_metrics(answer: Prediction, targets: Tensor) -> dict[str, Tensor]:
    """(T,) figures by name of answers that have a spread; see `EpisodeMetrics.extra`.

    Args:
        answer: With means and spreads (T, Q, D).
        targets: (T, Q, D).
    """
    assert answer.spread is not None
    mean, spread, targets = answer.outputs.double(), answer.spread.double(), targets.double()
    # Unchecked, so that what has diverged is a figure and no error.
    normal = Normal(mean, spread, validate_args=False)
    covered = (targets - mean).abs() <= _TWO_SIDED_95 * spread
    return {
        "log_likelihood": normal.log_prob(targets).mean((1, 2)),
        "coverage": covered.double().mean((1, 2)),
    }


def metric_values(spec: TaskSpec, outputs: Tensor, targets: Tensor) -> Tensor:
    # In float64, so that a share of 75 queries is the same number on every device.
    targets = targets if spec.kind == "classification" else targets.double()
    return task_metric(spec, outputs.detach().double(), targets)


def as_array(values: Tensor) -> Floats:
    return np.asarray(values.cpu().numpy(), dtype=np.float64)


def add_to_digest(digest: Digest, batch: TaskBatch) -> None:
    """Hash labels in full and of each input row some 64 values: whole images cost seconds."""
    parts = [batch.support_y, batch.query_y]
    parts += [] if batch.class_ids is None else [batch.class_ids]
    for inputs in (batch.support_x, batch.query_x):
        rows = inputs.flatten(2)
        parts.append(rows[..., :: max(1, rows.shape[-1] // 64)])
    arrays = [part.cpu().numpy() for part in parts]
    # Task by task, so that the hash does not depend on how the episodes were cut.
    for task in range(batch.num_tasks):
        for array in arrays:
            digest.update(array[task].tobytes())
