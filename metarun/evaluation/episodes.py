"""Evaluation of an algorithm on the episodes of a split.

Shapes: T tasks, Q query rows, P points of the adaptation curve, N different pairs of classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor

from metarun.algorithms.base import Algorithm
from metarun.core import distributed, seeding
from metarun.core.statistics import Floats
from metarun.core.types import EpisodeSource, Split, TaskBatch, TaskSpec
from metarun.evaluation.measures import (
    EpisodeMetrics,
    add_to_digest,
    as_array,
    by_presentation,
    metric_values,
    uncertainty_metrics,
)
from metarun.evaluation.stream_rollouts import SplitRollouts
from metarun.evaluation.task_clusters import Labels
from metarun.evaluation.test_time_augmentation import predict


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
    """Return the metrics of an algorithm on the first episodes of a split.

    The state of the algorithm and of the source does not change. Several processes evaluate
    different batches of the same size as one process would, and all receive the metrics; the
    main process computes the hash. Rollouts along streams run in the main process only.

    Args:
        algorithm: Learner that adapts to each episode and predicts its queries.
        source: Data set that the episodes come from.
        split: `val` or `test`; `train` evaluates training tasks.
        episodes: Number of episodes.
        tasks_per_batch: Episodes that are evaluated together.
        views: Views of each image that predictions are averaged over; see
            `test_time_augmentation.predict`.
        curve_steps: Largest number of inner steps of the adaptation curve, which uses the first
            view only; None computes no curve.
        tick: Function called after each batch with the number of episodes done; it may raise an
            exception to stop.
    """
    if source.spec.streams is not None:
        rollouts = SplitRollouts(algorithm, source, split, episodes, tasks_per_batch, follow=False)
        return distributed.on_main(
            lambda: rollouts.run(None if tick is None else lambda _: tick(0))
        )
    starts = range(0, episodes, tasks_per_batch)
    mine: list[_Part] = []
    digest = hashlib.blake2b(digest_size=8)
    was_training = algorithm.training
    algorithm.eval()
    try:
        with torch.no_grad():
            for round_ in _rounds(starts):
                for number, start in enumerate(round_):
                    own = number == distributed.rank()
                    if not own and not distributed.is_main():
                        continue
                    batch = source.batch(split, start, min(tasks_per_batch, episodes - start))
                    if distributed.is_main():
                        add_to_digest(digest, batch)
                    if own:
                        # Algorithms that sample in `predict` give the same prediction each time.
                        seeding.seed_torch(seeding.key("evaluation", split, start))
                        mine.append(_measured(algorithm, source.spec, batch, views, curve_steps))
                if tick is not None:
                    tick(min(round_[-1] + tasks_per_batch, episodes))
    finally:
        algorithm.train(was_training)
    parts = _in_order(distributed.gather_objects(mine), len(starts))
    return EpisodeMetrics(
        values=as_array(torch.cat([part.values for part in parts])),
        curve=_joined([part.curve for part in parts], dim=1),
        embeddings=_joined([part.embeddings for part in parts]),
        digest=digest.hexdigest(),
        presentations=_joined([part.presentations for part in parts]),
        extra=_joined_by_name([part.extra for part in parts]),
        families=_labels([part.families for part in parts]),
        groups=_labels([part.groups for part in parts]),
        confusions=_counted([part.confused for part in parts]),
        strategies=_joined_by_name([part.strategies for part in parts]),
        alternatives=_joined_by_name([part.alternatives for part in parts]),
    )


def _rounds(starts: Sequence[int]) -> Iterator[Sequence[int]]:
    """Yield the batches that the processes evaluate at the same time, one for each process."""
    for first in range(0, len(starts), distributed.size()):
        yield starts[first : first + distributed.size()]


def _in_order(parts: Sequence[Sequence[_Part]], number: int) -> list[_Part]:
    """Return the parts in the order of the batches, from the parts of each process."""
    return [parts[batch % len(parts)][batch // len(parts)] for batch in range(number)]


@dataclass(frozen=True, slots=True)
class _Part:
    """The metrics of one batch, named as in `EpisodeMetrics`."""

    values: Tensor
    curve: Tensor | None
    embeddings: Tensor | None
    presentations: Tensor | None
    extra: Mapping[str, Tensor]
    families: Tensor | None
    groups: Tensor | None
    confused: Tensor | None
    strategies: Mapping[str, Tensor]
    alternatives: Mapping[str, Tensor]


def _measured(
    algorithm: Algorithm, spec: TaskSpec, batch: TaskBatch, views: int, curve_steps: int | None
) -> _Part:
    """Return the metrics of an algorithm on one batch."""
    answer = predict(algorithm, batch.support_x, batch.support_y, batch.query_x, views)

    def figures(outputs: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        return {
            n: metric_values(spec, found, batch.query_y) for n, found in (outputs or {}).items()
        }

    ids = batch.class_ids
    sequence, shares = answer.sequence, answer.responsibilities
    part = _Part(
        values=metric_values(spec, answer.outputs, batch.query_y),
        curve=None if curve_steps is None else _curve(algorithm, spec, batch, curve_steps),
        embeddings=answer.embedding,
        presentations=None if sequence is None else by_presentation(sequence, batch.support_y),
        extra={} if answer.spread is None else uncertainty_metrics(answer, batch.query_y),
        families=None if ids is None or spec.kind != "regression" else ids[:, 0],
        groups=None if shares is None else shares.argmax(1),
        confused=None
        if ids is None or spec.num_train_classes is None
        else _confused(answer.outputs, batch.query_y, ids),
        strategies=figures(answer.strategies),
        alternatives=figures(answer.alternatives),
    )
    return part if distributed.size() == 1 else _on_cpu(part)


def _on_cpu(part: _Part) -> _Part:
    """Return the part with its tensors on the CPU, to be sent to other processes."""

    def moved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: moved(item) for name, item in cast("Mapping[str, Any]", value).items()}
        return None if value is None else value.cpu()

    return _Part(**{one.name: moved(getattr(part, one.name)) for one in fields(part)})


def _joined(parts: Sequence[Tensor | None], dim: int = 0) -> Floats | None:
    found = [part for part in parts if part is not None]
    return as_array(torch.cat(found, dim=dim)) if found else None


def _joined_by_name(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Floats]:
    return {name: as_array(torch.cat([part[name] for part in parts])) for name in parts[0]}


def _labels(parts: Sequence[Tensor | None]) -> Labels | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found).cpu().numpy() if found else None


def _confused(outputs: Tensor, labels: Tensor, class_ids: Tensor) -> Tensor:
    """Return the true and the predicted data-set class of each query, (T * Q, 2)."""
    ids = [class_ids.gather(1, local) for local in (labels, outputs.argmax(-1))]
    return torch.stack(ids, -1).flatten(0, 1)


def _counted(parts: Sequence[Tensor | None]) -> Labels | None:
    """Return the different pairs of classes and the count of each, (N, 3)."""
    pairs = [part for part in parts if part is not None]
    if not pairs:
        return None
    found, counts = torch.cat(pairs).cpu().unique(dim=0, return_counts=True)
    return torch.cat([found, counts[:, None]], 1).numpy()


def _curve(algorithm: Algorithm, spec: TaskSpec, batch: TaskBatch, steps: int) -> Tensor | None:
    """Return the metric (P, T) of a batch after 0 … `steps` inner steps."""
    outputs = algorithm.trace(batch.support_x, batch.support_y, batch.query_x, steps)
    return None if outputs is None else metric_values(spec, outputs, batch.query_y)
