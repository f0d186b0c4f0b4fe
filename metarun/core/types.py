"""The types that data, algorithms and the trainer share; no torch is imported at run time.

Shapes: T tasks, S support rows, Q query rows, W ways, D outputs of a regression.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

Metrics = dict[str, "Tensor"]
"""Scalars (0-dimensional, detached) by name, for example `{"loss": …, "accuracy": …}`."""


@dataclass(frozen=True, slots=True)
class EpisodeSize:
    """How many rows a task has: `shot` and `query` rows for each of `way` classes.

    A regression task has way 1: S = shot and Q = query.
    """

    way: int
    shot: int
    query: int


@dataclass(frozen=True, slots=True)
class Stream:
    """How the rows of a trajectory follow each other: a long task, learned online.

    A trajectory is a task of a `TaskBatch` whose support rows are its steps in order, and whose
    query rows are held-out rows of its own tasks, one task after another. All trajectories of
    a split have the same layout; what differs is what its tasks are.

    Attributes:
        visits: The task of each visit, in order; tasks are numbered by their first visit.
        steps: Steps of a visit.
        rows: Rows of a step.
        queries: Held-out rows of each task.
        task_ids_known: Whether a learner may know which task a row is of.
    """

    visits: tuple[int, ...]
    steps: int
    rows: int
    queries: int
    task_ids_known: bool = True

    @classmethod
    def of(cls, layout: Mapping[str, Any]) -> Stream:
        """From its entries in a run's `results.json`, where a tuple is a list."""
        return cls(**{**layout, "visits": tuple(layout["visits"])})

    @property
    def num_tasks(self) -> int:
        return max(self.visits) + 1

    @property
    def num_steps(self) -> int:
        return len(self.visits) * self.steps

    def task(self, step: int) -> int:
        """The task that a step is of."""
        return self.visits[step // self.steps]


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """What a task asks for.

    Attributes:
        kind: `classification` or `regression`.
        input_shape: Shape of one input row, without batch dimensions.
        output_dim: Ways of a classification at evaluation, or values per row of a regression.
        train_way: Ways of a training task (`output_dim` unless the algorithm trains on more).
        num_train_classes: Classes of the training split, which `TaskBatch.class_ids` numbers from
            0, so that `class_ids.gather(1, support_y)` are labels among all of them; rotations
            count where each is a class. None in regression, and where a label is of several.
        train_shot: Support rows of each class of a training task; None where it is not known.
        streams: Layout of the trajectories of each split; None where tasks are not streams.
            The labels of a trajectory are numbers below `output_dim`, which is wide enough for
            those of every split.
    """

    kind: Literal["classification", "regression"]
    input_shape: tuple[int, ...]
    output_dim: int
    train_way: int
    num_train_classes: int | None = None
    train_shot: int | None = None
    streams: Mapping[Split, Stream] | None = None

    @property
    def metric(self) -> str:
        """Name of the figure that is reported: `accuracy` (higher is better) or `mse` (lower)."""
        return "accuracy" if self.kind == "classification" else "mse"

    @property
    def higher_is_better(self) -> bool:
        return self.kind == "classification"


@dataclass(frozen=True, slots=True)
class TaskBatch:
    """T tasks with S support and Q query rows each.

    Attributes:
        support_x: (T, S, *input_shape); the order of rows is the order of presentation.
        support_y: (T, S) int64 labels, or (T, S, D) values.
        query_x: (T, Q, *input_shape).
        query_y: As `support_y`, for the query rows.
        class_ids: (T, W) int64, the data-set class behind each local label, or the first of
            several; of a regression (T, 1), the family of each task's function, or None where
            there is but one.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    class_ids: Tensor | None = None

    @property
    def num_tasks(self) -> int:
        return self.support_x.shape[0]

    def chunks(self, size: int) -> Iterator[TaskBatch]:
        """Cut into batches of at most `size` tasks, in order."""
        for start in range(0, self.num_tasks, size):
            yield self[start : start + size]

    def __getitem__(self, tasks: slice) -> TaskBatch:
        return TaskBatch(
            self.support_x[tasks],
            self.support_y[tasks],
            self.query_x[tasks],
            self.query_y[tasks],
            None if self.class_ids is None else self.class_ids[tasks],
        )


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answers to T tasks.

    Attributes:
        outputs: (T, Q, W) logits, or (T, Q, D) values.
        spread: Standard deviation beside `outputs`, same shape, where the method has one.
        sequence: (T, S, W), for memory-based learners: the answer at row t given the labels
            of the rows before it.
        embedding: (T, E) what the method has made of each task's support, where that is a
            vector of one size.
        responsibilities: (T, K) share of each of K components in a task, of a mixture.
        strategies: (T, Q, …) answers by name of each way of learning that it chose among, of
            which the metric can be taken as of `outputs`.
        alternatives: The same of other ways to choose among them, or to join them.
    """

    outputs: Tensor
    spread: Tensor | None = None
    sequence: Tensor | None = None
    embedding: Tensor | None = None
    responsibilities: Tensor | None = None
    strategies: Mapping[str, Tensor] | None = None
    alternatives: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class LearnedState:
    """What another run has learned, for an algorithm that builds on it.

    An option with this type hint is typed as the folder of the run, and loaded by the builder.

    Attributes:
        run: The folder, as it was typed.
        state: Parameters and buffers by name.
    """

    run: str
    state: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Share:
    """The tasks of an update that one of several processes has.

    Attributes:
        first: Number of the first of them among the tasks of the update.
        count: How many they are.
        total: How many the update has.
    """

    first: int
    count: int
    total: int

    @classmethod
    def of(cls, total: int, rank: int, size: int) -> Share:
        """Of process `rank` among `size`: neighboring tasks, as many as the others or one less."""
        first = rank * total // size
        return cls(first, (rank + 1) * total // size - first, total)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training stands: `step` updates are done, of `total`.

    Attributes:
        share: Which of an update's tasks are in its batch, where processes share them; None
            where the batch has them all.
    """

    step: int
    total: int
    share: Share | None = None

    def first_task(self, num_tasks: int) -> int:
        """Number of a batch's first task among all of training, which draws are keyed by."""
        if self.share is None:
            return self.step * num_tasks
        return self.step * self.share.total + self.share.first

    @property
    def fraction(self) -> float:
        """Share of the updates done, in [0, 1)."""
        return self.step / self.total


class EpisodeSource(Protocol):
    """A data set seen as an endless, pure sequence of tasks for each split."""

    spec: TaskSpec
    sizes: dict[Split, EpisodeSize]
    device: torch.device

    def batch(self, split: Split, index: int, num_tasks: int) -> TaskBatch:
        """Tasks `index … index + num_tasks - 1` of a split; the same call gives the same tasks.

        It equals the stack of the same tasks drawn one by one.
        """
        ...

    def fingerprint(self) -> str:
        """A hash of the data and the split, for the records of a run."""
        ...


Record = dict[str, Any]
