"""What an algorithm reaches on a split: a metric for each episode, its mean and its interval.

Shapes: T tasks, Q query rows, W ways, D outputs, N episodes, P points of the adaptation curve,
E numbers of a task's embedding, S support rows, K presentations of a class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal

from metarun.algorithms.base import Algorithm, task_metric
from metarun.algorithms.common.online import OnlineLearner
from metarun.core import distributed, seeding
from metarun.core.statistics import Floats
from metarun.core.types import EpisodeSource, Prediction, Split, TaskBatch, TaskSpec
from metarun.evaluation.stream_rollouts import Lifetimes
from metarun.evaluation.task_clusters import Labels
from metarun.evaluation.test_time_augmentation import predict

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
        beside: (N,) each by name, where the algorithm says how sure it is: `log_likelihood` of the
            targets under normals with the answers' means and spreads, and `coverage`, the share
            of targets within 1.96 spreads of the mean.
        families: (N,) the number of the family of functions that each task is of; None where
            there is but one.
        groups: (N,) the component with the greatest responsibility for each task; None where the
            algorithm is no mixture.
        strategies: (N,) the metric by name of each way of learning that it chose among.
        rivals: (N,) the same of other ways to choose among them, or to join them.
        confusions: (P, 3) the data-set class of queries, the class that they were taken for, and
            their number; None where a label is of no one class.
        digest: A hash of the episodes themselves: equal for equal episodes, however cut.
        lived: What was measured along trajectories, (N, …) by name; None of other tasks. See
            `Lifetimes.measured`, and `untaught`.
    """

    values: Floats
    curve: Floats | None
    embeddings: Floats | None
    digest: str
    lived: Mapping[str, Floats] | None = None
    presentations: Floats | None = None
    beside: Mapping[str, Floats] = field(default_factory=dict)
    families: Labels | None = None
    groups: Labels | None = None
    strategies: Mapping[str, Floats] = field(default_factory=dict)
    rivals: Mapping[str, Floats] = field(default_factory=dict)
    confusions: Labels | None = None


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

    Several processes measure batches side by side, cut as one would cut them, and all get what
    was measured; the hash is the first one's. Trajectories are lived in the first one.
    """
    if source.spec.streams is not None:
        living = Living(algorithm, source, split, episodes, tasks_per_batch, follow=False)
        return distributed.on_first(lambda: living.run(None if tick is None else lambda _: tick(0)))
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
                    if not own and not distributed.first():
                        continue
                    batch = source.batch(split, start, min(tasks_per_batch, episodes - start))
                    if distributed.first():
                        _add(digest, batch)
                    if own:
                        # An algorithm that draws numbers to answer answers the same each time.
                        seeding.seed_torch(seeding.key("evaluation", split, start))
                        mine.append(_measured(algorithm, source.spec, batch, views, curve_steps))
                if tick is not None:
                    tick(min(round_[-1] + tasks_per_batch, episodes))
    finally:
        algorithm.train(was_training)
    parts = _in_order(distributed.collected(mine), len(starts))
    return EpisodeMetrics(
        values=_array(torch.cat([part.values for part in parts])),
        curve=_joined([part.curve for part in parts], dim=1),
        embeddings=_joined([part.embeddings for part in parts]),
        digest=digest.hexdigest(),
        presentations=_joined([part.presentations for part in parts]),
        beside=_joined_by_name([part.beside for part in parts]),
        families=_labels([part.families for part in parts]),
        groups=_labels([part.groups for part in parts]),
        confusions=_counted([part.confused for part in parts]),
        strategies=_joined_by_name([part.strategies for part in parts]),
        rivals=_joined_by_name([part.rivals for part in parts]),
    )


def _rounds(starts: Sequence[int]) -> Iterator[Sequence[int]]:
    """The batches that the processes evaluate at the same time, one each."""
    for first in range(0, len(starts), distributed.size()):
        yield starts[first : first + distributed.size()]


def _in_order(parts: Sequence[Sequence[_Part]], number: int) -> list[_Part]:
    """The parts of all batches, from those that each process has of its own."""
    return [parts[batch % len(parts)][batch // len(parts)] for batch in range(number)]


@dataclass(frozen=True, slots=True)
class _Part:
    """What was measured on one batch, on the CPU; as in `EpisodeMetrics`."""

    values: Tensor
    curve: Tensor | None
    embeddings: Tensor | None
    presentations: Tensor | None
    beside: Mapping[str, Tensor]
    families: Tensor | None
    groups: Tensor | None
    confused: Tensor | None
    strategies: Mapping[str, Tensor]
    rivals: Mapping[str, Tensor]


def _measured(
    algorithm: Algorithm, spec: TaskSpec, batch: TaskBatch, views: int, curve_steps: int | None
) -> _Part:
    """Measure an algorithm on one batch."""
    answer = predict(algorithm, batch.support_x, batch.support_y, batch.query_x, views)

    def figures(outputs: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        return {n: _figures(spec, found, batch.query_y) for n, found in (outputs or {}).items()}

    ids = batch.class_ids
    sequence, shares = answer.sequence, answer.responsibilities
    part = _Part(
        values=_figures(spec, answer.outputs, batch.query_y),
        curve=None if curve_steps is None else _curve(algorithm, spec, batch, curve_steps),
        embeddings=answer.embedding,
        presentations=None if sequence is None else by_presentation(sequence, batch.support_y),
        beside={} if answer.spread is None else sureness(answer, batch.query_y),
        families=None if ids is None or spec.kind != "regression" else ids[:, 0],
        groups=None if shares is None else shares.argmax(1),
        confused=None
        if ids is None or spec.num_train_classes is None
        else _confused(answer.outputs, batch.query_y, ids),
        strategies=figures(answer.strategies),
        rivals=figures(answer.rivals),
    )
    return part if distributed.size() == 1 else _on_cpu(part)


def _on_cpu(part: _Part) -> _Part:
    """As it goes to the other processes."""

    def moved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: moved(item) for name, item in cast("Mapping[str, Any]", value).items()}
        return None if value is None else value.cpu()

    return _Part(**{one.name: moved(getattr(part, one.name)) for one in fields(part)})


def _joined(parts: Sequence[Tensor | None], dim: int = 0) -> Floats | None:
    found = [part for part in parts if part is not None]
    return _array(torch.cat(found, dim=dim)) if found else None


def _joined_by_name(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Floats]:
    return {name: _array(torch.cat([part[name] for part in parts])) for name in parts[0]}


def _labels(parts: Sequence[Tensor | None]) -> Labels | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found).cpu().numpy() if found else None


def _confused(outputs: Tensor, labels: Tensor, class_ids: Tensor) -> Tensor:
    """(T Q, 2) the data-set class of each query, and of the answer to it."""
    ids = [class_ids.gather(1, local) for local in (labels, outputs.argmax(-1))]
    return torch.stack(ids, -1).flatten(0, 1)


def _counted(parts: Sequence[Tensor | None]) -> Labels | None:
    """Different rows of all (N, 2), with their number behind them."""
    pairs = [part for part in parts if part is not None]
    if not pairs:
        return None
    found, counts = torch.cat(pairs).cpu().unique(dim=0, return_counts=True)
    return torch.cat([found, counts[:, None]], 1).numpy()


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


def sureness(answer: Prediction, targets: Tensor) -> dict[str, Tensor]:
    """(T,) figures by name of answers that have a spread; see `EpisodeMetrics.beside`.

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


class Living:
    """All the lifetimes of a split, some side by side, the others after them; can be taken up.

    Args:
        algorithm: Who lives.
        source: A stream.
        split: Of which trajectories.
        episodes: N.
        tasks_per_batch: Lifetimes side by side.
        follow: As in `Lifetimes`.

    Attributes:
        steps: Steps of all batches together.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        source: EpisodeSource,
        split: Split,
        episodes: int,
        tasks_per_batch: int,
        *,
        follow: bool = True,
    ) -> None:
        assert isinstance(algorithm, OnlineLearner)
        assert source.spec.streams is not None
        self._algorithm = algorithm
        self._source = source
        self._split: Split = split
        self._stream = source.spec.streams[split]
        self._follow = follow
        self._starts = list(range(0, episodes, tasks_per_batch))
        self._sizes = [min(tasks_per_batch, episodes - start) for start in self._starts]
        self.steps = len(self._starts) * self._stream.num_steps
        self._done: list[dict[str, Tensor]] = []
        self._lives: Lifetimes | None = None

    def run(self, tick: Callable[[int], None] | None = None) -> EpisodeMetrics:
        """Live to the end.

        Args:
            tick: Called after each step with the steps done; may raise to stop, and `run` goes
                on where it was.
        """
        was_training = self._algorithm.training
        self._algorithm.eval()
        try:
            while len(self._done) < len(self._starts):
                lives = self._lives = self._lives or self._begin()
                before = len(self._done) * self._stream.num_steps

                def look(lives: Lifetimes = lives, before: int = before) -> None:
                    if tick is not None:
                        tick(before + lives.step)

                lives.begin(look)
                while not lives.finished:
                    lives.advance()
                    look()
                measured = lives.measured() if self._follow else {}
                extra = {"untaught": lives.untaught()} if self._follow else {}
                self._done.append({**measured, **extra, "final": lives.final()})
                self._lives = None
        finally:
            self._algorithm.train(was_training)
        lived = {n: _array(torch.cat([part[n] for part in self._done])) for n in self._done[0]}
        return EpisodeMetrics(
            values=lived.pop("final"),
            curve=None,
            embeddings=None,
            digest=self._digest(),
            lived=lived if self._follow else None,
        )

    def save(self) -> dict[str, Any]:
        """All that a later `restore` needs."""
        return {"done": self._done, "lives": None if self._lives is None else self._lives.save()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on where the same lifetimes were saved."""
        self._done = list(saved["done"])
        if saved["lives"] is not None:
            self._lives = self._begin()
            self._lives.restore(saved["lives"])

    def _begin(self) -> Lifetimes:
        batch = self._batch(len(self._done))
        return Lifetimes(self._algorithm, batch, self._stream, follow=self._follow)

    def _batch(self, number: int) -> TaskBatch:
        return self._source.batch(self._split, self._starts[number], self._sizes[number])

    def _digest(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for number in range(len(self._starts)):
            _add(digest, self._batch(number))
        return digest.hexdigest()


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
