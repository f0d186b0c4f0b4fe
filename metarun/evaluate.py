"""What an algorithm reaches on a split: a metric for each episode, its mean and its interval.

Shapes: T tasks, Q query rows, W ways, D outputs, N episodes, P points of the adaptation curve,
E numbers of a task's embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarun import seeding
from metarun.algorithms.base import Algorithm, task_metric
from metarun.intervals import Floats
from metarun.types import EpisodeSource, Split, TaskBatch, TaskSpec
from metarun.views import predict

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
        digest: A hash of the episodes themselves: equal for equal episodes, however cut.
    """

    values: Floats
    curve: Floats | None
    embeddings: Floats | None
    digest: str


def evaluate(
    algorithm: Algorithm,
    source: EpisodeSource,
    split: Split,
    episodes: int,
    tasks_per_batch: int,
    *,
    views: int = 1,
    curve_steps: int | None = None,
    tick: Callable[[int], None] | None = None,
) -> EpisodeMetrics:
    """Measure an algorithm on the first episodes of a split; changes no state of either.

    Args:
        algorithm: Adapts to each episode and answers its queries.
        source: Where the episodes come from.
        split: `val` or `test`, or `train` for a look at the training tasks.
        episodes: N.
        tasks_per_batch: Episodes that are evaluated together.
        views: Of each image that an answer is averaged over; see `views.predict`.
        curve_steps: Also take the metric after 0 … this many inner steps, without other views.
        tick: Called with the number of episodes done after each batch; may raise to stop.
    """
    values: list[Tensor] = []
    curves: list[Tensor] = []
    embeddings: list[Tensor] = []
    digest = hashlib.blake2b(digest_size=8)
    was_training = algorithm.training
    algorithm.eval()
    try:
        with torch.no_grad():
            for start in range(0, episodes, tasks_per_batch):
                batch = source.batch(split, start, min(tasks_per_batch, episodes - start))
                _add(digest, batch)
                # An algorithm that draws numbers to answer answers the same each time.
                torch.manual_seed(seeding.key("evaluation", split, start))
                answer = predict(algorithm, batch.support_x, batch.support_y, batch.query_x, views)
                values.append(_figures(source.spec, answer.outputs, batch.query_y))
                embeddings += [] if answer.embedding is None else [answer.embedding]
                if curve_steps is not None:
                    curve = _curve(algorithm, source.spec, batch, curve_steps)
                    curves += [] if curve is None else [curve]
                if tick is not None:
                    tick(start + batch.num_tasks)
    finally:
        algorithm.train(was_training)
    return EpisodeMetrics(
        values=_array(torch.cat(values)),
        curve=_array(torch.cat(curves, dim=1)) if curves else None,
        embeddings=_array(torch.cat(embeddings)) if embeddings else None,
        digest=digest.hexdigest(),
    )


def _curve(algorithm: Algorithm, spec: TaskSpec, batch: TaskBatch, steps: int) -> Tensor | None:
    """(P, T) figures of a batch after 0 … `steps` inner steps."""
    outputs = algorithm.trace(batch.support_x, batch.support_y, batch.query_x, steps)
    return None if outputs is None else _figures(spec, outputs, batch.query_y)


def _figures(spec: TaskSpec, outputs: Tensor, targets: Tensor) -> Tensor:
    # In float64, so that a share of 75 queries is the same number on every device.
    targets = targets if spec.kind == "classification" else targets.double()
    return task_metric(spec, outputs.detach().double(), targets)


def _array(values: Tensor) -> Floats:
    return np.asarray(values.cpu().numpy(), dtype=np.float64)


def _add(digest: Digest, batch: TaskBatch) -> None:
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
