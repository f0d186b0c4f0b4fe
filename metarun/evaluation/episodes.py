"""Evaluation of an algorithm on the episodes of a split.

Shapes: T tasks, N episodes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from metarun.algorithms.base import Algorithm
from metarun.core import distributed, seeding
from metarun.core.types import (
    EpisodeSource,
    HasLayouts,
    HasSources,
    Record,
    Split,
    TaskBatch,
    layouts_differ,
)
from metarun.evaluation.details import DETAILS
from metarun.evaluation.evaluation import (
    Digest,
    Evaluated,
    Tick,
    add_to_digest,
    base_record,
    by_source,
    merged,
)
from metarun.evaluation.measures import BUILT_IN, Answers, Array, Joined, Measurement, as_array
from metarun.evaluation.stream_rollouts import StreamEvaluation
from metarun.evaluation.test_time_augmentation import predict

_Parts = list[tuple[Tensor, list[Mapping[str, Tensor]]]]
"""Metric (T,) of each batch, and what each measurement takes from it."""


def evaluate(
    algorithm: Algorithm,
    source: EpisodeSource,
    split: Split,
    episodes: int,
    tasks_per_batch: int,
    *,
    tick: Tick | None = None,
    **options: Any,
) -> Evaluated:
    """Return the results of an algorithm on the first episodes of a split, or its streams.

    Args:
        algorithm: Learner that adapts to each episode and predicts its queries.
        source: Data set that the episodes come from.
        split: `val` or `test`; `train` evaluates training tasks.
        episodes, tasks_per_batch: See `EpisodeEvaluation`.
        tick: Function called after each batch with the number of episodes done; it may raise an
            exception to stop.
        **options: Further arguments of `EpisodeEvaluation`; streams ignore them.
    """
    if source.spec.streams is not None:
        return StreamEvaluation(
            algorithm, source, split, episodes, tasks_per_batch, follow=False
        ).run(tick)
    return EpisodeEvaluation(algorithm, source, split, episodes, tasks_per_batch, **options).run(
        tick
    )


class EpisodeEvaluation:
    """Metrics of an algorithm on the first episodes of a split.

    Several processes evaluate different batches of the same size as one process would, and all
    receive the results; the main process computes the hash. Where sizes vary, a batch has episodes
    of one size, and the results are in the order of the episodes.

    Args:
        algorithm: Learner that adapts to each episode and predicts its queries.
        source: Data set that the episodes come from.
        split: Split that the episodes come from.
        episodes: Number of episodes.
        tasks_per_batch: Episodes that are evaluated together.
        views: Views of each image that predictions are averaged over; see
            `test_time_augmentation.predict`.
        curve_steps: Largest number of inner steps of the adaptation curve, which uses the first
            view only; None computes no curve.
        measurements: What is measured in addition to the metric.
        temperature: Divisor of a classifier's logits in its measures.

    Attributes:
        size: Number of episodes.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        source: EpisodeSource,
        split: Split,
        episodes: int,
        tasks_per_batch: int,
        *,
        views: int = 1,
        curve_steps: int | None = None,
        measurements: Sequence[Measurement] = (*DETAILS, *BUILT_IN),
        temperature: float = 1.0,
    ) -> None:
        self.size = episodes
        self._algorithm = algorithm
        self._source = source
        self._split: Split = split
        self._tasks_per_batch = tasks_per_batch
        self._views = views
        self._curve_steps = curve_steps
        self._measurements = measurements
        self._temperature = temperature

    def run(self, tick: Tick | None = None) -> Evaluated:
        """Evaluate all episodes; see `Evaluation.run`."""
        batches = self._batches()
        mine: _Parts = []
        digest = _Digest(in_order=not layouts_differ(self._source, self._split))
        was_training = self._algorithm.training
        self._algorithm.eval()
        try:
            with torch.no_grad():
                done = 0
                for round_ in _rounds(batches):
                    for number, indices in enumerate(round_):
                        done += len(indices)
                        own = number == distributed.rank()
                        if not own and not distributed.is_main():
                            continue
                        batch = self._batch(indices)
                        if distributed.is_main():
                            digest.add(batch, indices)
                        if own:
                            # Algorithms that sample in `predict` predict the same each time.
                            seeding.seed_torch(seeding.key("evaluation", self._split, indices[0]))
                            mine.append(self._measured(batch))
                    if tick is not None:
                        tick(done)
        finally:
            self._algorithm.train(was_training)
        parts = _in_order(distributed.gather_objects(mine), len(batches))
        return self._evaluated(parts, digest.hexdigest(), list(chain.from_iterable(batches)))

    def state_dict(self) -> Record | None:
        """Return None: an evaluation that was stopped starts again."""
        return None

    def load_state_dict(self, state: Record) -> None:
        """Start again."""

    def _batches(self) -> list[Sequence[int]]:
        """Return the episodes that are evaluated together: those of one layout, in their order."""
        most, every = self._tasks_per_batch, range(self.size)
        if not layouts_differ(self._source, self._split):
            return [every[start : start + most] for start in range(0, self.size, most)]
        assert isinstance(self._source, HasLayouts)
        found: dict[Hashable, list[int]] = {}
        for index in every:
            found.setdefault(self._source.layout(self._split, index), []).append(index)
        parts = [own[at : at + most] for own in found.values() for at in range(0, len(own), most)]
        return [*sorted(parts)]

    def _batch(self, indices: Sequence[int]) -> TaskBatch:
        if isinstance(indices, range):
            return self._source.batch(self._split, indices[0], len(indices))
        return TaskBatch.joined([self._source.batch(self._split, i, 1) for i in indices])

    def _measured(self, batch: TaskBatch) -> tuple[Tensor, list[Mapping[str, Tensor]]]:
        algorithm, rows = self._algorithm, (batch.support_x, batch.support_y, batch.query_x)
        prediction = predict(algorithm, *rows, self._views)
        steps = self._curve_steps
        trace = None if steps is None else algorithm.trace(*rows, steps)
        answers = Answers(self._source.spec, batch, prediction, self._temperature, trace)
        values = answers.metric(prediction.outputs)
        found = [measurement.of(answers) for measurement in self._measurements]
        if distributed.size() == 1:
            return values, found
        # Processes exchange tensors on the CPU.
        return values.cpu(), [{n: part.cpu() for n, part in own.items()} for own in found]

    def _evaluated(self, parts: _Parts, digest: str, indices: Sequence[int]) -> Evaluated:
        source, order = self._source, np.argsort(indices)
        values = as_array(torch.cat([part for part, _ in parts]))[order]
        arrays: dict[str, Any] = {source.spec.metric: values}
        records = [base_record(values, digest)]
        for number, measurement in enumerate(self._measurements):
            joined = _joined([found[number] for _, found in parts])
            # Where not every episode has one row, their order does not matter.
            joined = {n: own[order] if len(own) == len(order) else own for n, own in joined.items()}
            if joined:
                summary = measurement.summary(Joined(joined, values, source))
                arrays |= summary.arrays
                records.append(summary.record)
        if isinstance(source, HasSources):
            places = np.array([source.source_of(self._split, index) for index in range(self.size)])
            arrays["source"] = places
            records.append(by_source(values, places, source.names))
        return Evaluated(values, digest, arrays, merged(records))


class _Digest:
    """Hash of the episodes, which may come in another order than theirs."""

    def __init__(self, *, in_order: bool) -> None:
        self._whole: Digest = hashlib.blake2b(digest_size=8)
        self._own: dict[int, bytes] | None = None if in_order else {}

    def add(self, batch: TaskBatch, indices: Sequence[int]) -> None:
        if self._own is None:
            add_to_digest(self._whole, batch)
            return
        for place, index in enumerate(indices):
            own = hashlib.blake2b(digest_size=8)
            add_to_digest(own, batch[place : place + 1])
            self._own[index] = own.digest()

    def hexdigest(self) -> str:
        for index in sorted(self._own or ()):
            self._whole.update((self._own or {})[index])
        whole: str = self._whole.hexdigest()
        return whole


def tasks_alike(source: EpisodeSource, split: Split, count: int) -> TaskBatch:
    """Return the first tasks of a split that fit into one batch, `count` or fewer.

    Where tasks differ in size or source, they are among the first `20 count` tasks.
    """
    layout = source.layout if isinstance(source, HasLayouts) else None
    if layout is None or layout(split, 0) is None:
        return source.batch(split, 0, count)
    first = layout(split, 0)
    alike = [index for index in range(20 * count) if layout(split, index) == first][:count]
    return TaskBatch.joined([source.batch(split, index, 1) for index in alike])


def _rounds(batches: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """Yield the batches that the processes evaluate at the same time, one for each process."""
    for first in range(0, len(batches), distributed.size()):
        yield batches[first : first + distributed.size()]


def _in_order(parts: Sequence[_Parts], number: int) -> _Parts:
    """Return the parts in the order of the batches, from the parts of each process."""
    return [parts[batch % len(parts)][batch // len(parts)] for batch in range(number)]


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Array]:
    """Join the tensors of all batches along their first dimension.

    Where tasks differ in size, shorter rows end in NaN.
    """
    return {n: _stacked([part[n] for part in parts]).cpu().numpy() for n in parts[0]}


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    widths = {part.shape[1:] for part in parts}
    if len(widths) == 1 or any(len(width) != 1 for width in widths):
        return torch.cat([*parts])
    most = max(part.shape[1] for part in parts)
    padded = [pad(part, (0, most - part.shape[1]), value=math.nan) for part in parts]
    return torch.cat(padded)
