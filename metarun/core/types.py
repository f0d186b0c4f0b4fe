"""Types shared by data, algorithms and the trainer. Torch is not imported at run time.

Shapes: T tasks, S support rows, Q query rows, W ways, D outputs of a regression.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from metarun.core.sizes import Range, SizeRule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

Metrics = dict[str, "Tensor"]
"""Scalars (0-dimensional, detached) by name, for example `{"loss": …, "accuracy": …}`."""


Adapted = dict[str, "Tensor"]
"""What an algorithm learned from the support rows of T tasks: tensors (T, …) by name, such as
prototypes, adapted weights or the state of a memory."""


@dataclass(frozen=True, slots=True)
class EpisodeSize:
    """Size of a task: `shot` support rows and `query` query rows for each of `way` classes.

    A regression task has way 1, so S = shot and Q = query.
    """

    way: int
    shot: int
    query: int


@dataclass(frozen=True, slots=True)
class VaryingSize:
    """Sizes of the tasks of a split that vary: each step or episode draws one.

    Attributes:
        way, shot, query: Numbers that are drawn uniformly, independently of each other.
        rule: Rule that draws them instead; None draws from the ranges.
    """

    way: Range
    shot: Range
    query: Range
    rule: SizeRule | None = None

    @property
    def largest(self) -> EpisodeSize:
        """The largest size in the ranges."""
        return EpisodeSize(self.way.high, self.shot.high, self.query.high)

    @property
    def smallest(self) -> EpisodeSize:
        """The smallest size in the ranges."""
        return EpisodeSize(self.way.low, self.shot.low, self.query.low)


@dataclass(frozen=True, slots=True)
class Stream:
    """Layout of a stream: the order in which its tasks present their rows.

    A stream is one entry of a `TaskBatch` that is learned online. Its support rows are the rows of
    its steps in order. Its query rows are held-out rows of each of its tasks, grouped by task.
    All streams of a split have the same layout and differ in their tasks.

    Attributes:
        visits: Task of each visit, in order. Tasks are numbered by their first visit.
        steps: Number of steps in a visit.
        rows: Number of rows in a step.
        queries: Number of held-out rows of each task.
        task_ids_known: Whether the learner is given the task of each row.
    """

    visits: tuple[int, ...]
    steps: int
    rows: int
    queries: int
    task_ids_known: bool = True

    @classmethod
    def of(cls, layout: Mapping[str, Any]) -> Stream:
        """Return the layout stored in a run's `results.json`, where tuples are lists."""
        return cls(**{**layout, "visits": tuple(layout["visits"])})

    @property
    def num_tasks(self) -> int:
        """Number of different tasks in the stream."""
        return max(self.visits) + 1

    @property
    def num_steps(self) -> int:
        """Number of steps of all visits together."""
        return len(self.visits) * self.steps

    def task(self, step: int) -> int:
        """Return the task to which a step belongs."""
        return self.visits[step // self.steps]


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """Kind and shapes of the tasks of a data set.

    Attributes:
        kind: `classification` or `regression`.
        input_shape: Shape of one input row, without batch dimensions.
        output_dim: Number of ways at evaluation, or number of values per row in regression.
        train_way: Number of ways of a training task. It equals `output_dim` unless the algorithm
            trains on more ways.
        num_train_classes: Number of classes in the training split. `TaskBatch.class_ids` numbers
            them from 0, so `class_ids.gather(1, support_y)` gives global labels. Rotations count
            where each rotation is a class. None in regression, and where a label stands for
            several classes.
        train_shot: Support rows per class of a training task; None if unknown or if it varies.
        ways_vary: Whether tasks differ in their number of ways. `output_dim` and `train_way` are
            then the largest.
        shots_differ: Whether the classes of a task may differ in their number of support rows.
        streams: Layout of the streams of each split; None if tasks are not streams. The labels
            of every split's streams are below `output_dim`.
    """

    kind: Literal["classification", "regression"]
    input_shape: tuple[int, ...]
    output_dim: int
    train_way: int
    num_train_classes: int | None = None
    train_shot: int | None = None
    ways_vary: bool = False
    shots_differ: bool = False
    streams: Mapping[Split, Stream] | None = None

    @property
    def metric(self) -> str:
        """Name of the reported metric: `accuracy` (higher is better) or `mse` (lower is better)."""
        return "accuracy" if self.kind == "classification" else "mse"

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value of the metric is better."""
        return self.kind == "classification"


@dataclass(frozen=True, slots=True)
class TaskBatch:
    """T tasks with S support and Q query rows each.

    Attributes:
        support_x: (T, S, *input_shape); the order of rows is the order of presentation.
        support_y: (T, S) int64 labels, or (T, S, D) values.
        query_x: (T, Q, *input_shape).
        query_y: As `support_y`, for the query rows.
        class_ids: (T, W) int64, the data-set class of each local label, or the first of several.
            In regression, (T, 1) family of each task's function, or None if there is one family.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    class_ids: Tensor | None = None

    @property
    def num_tasks(self) -> int:
        """Number of tasks T."""
        return self.support_x.shape[0]

    @classmethod
    def joined(cls, batches: Sequence[TaskBatch]) -> TaskBatch:
        """Return the tasks of several batches in one, in their order.

        Raises:
            ValueError: Their tasks differ in size.
        """
        import torch

        first = batches[0]
        if len(batches) == 1:
            return first
        parts = [(b.support_x, b.query_x, b.class_ids) for b in batches]
        shapes = {tuple(p if p is None else p.shape[1:] for p in own) for own in parts}
        if len(shapes) > 1:
            raise ValueError("tasks of different sizes make no batch: ask for one task at a time")
        ids = [b.class_ids for b in batches if b.class_ids is not None]
        return cls(
            torch.cat([b.support_x for b in batches]),
            torch.cat([b.support_y for b in batches]),
            torch.cat([b.query_x for b in batches]),
            torch.cat([b.query_y for b in batches]),
            torch.cat(ids) if len(ids) == len(batches) else None,
        )

    def chunks(self, size: int) -> Iterator[TaskBatch]:
        """Yield batches of at most `size` tasks, in order."""
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
    """Predictions for the query rows of T tasks.

    Attributes:
        outputs: (T, Q, W) logits, or (T, Q, D) values.
        spread: Predictive standard deviation, of the shape of `outputs`; None if the method has
            none.
        sequence: (T, S, W) logits of a memory-based learner: the prediction at row t, given the
            labels of the rows before t.
        embedding: (T, E) vector to which the method encodes each task's support set, if that
            vector has a fixed size.
        responsibilities: (T, K) responsibility of each of K mixture components for a task.
        strategies: (T, Q, …) predictions of each strategy that a selector chose among, by name.
            The metric applies to them as to `outputs`.
        alternatives: (T, Q, …) predictions of other rules to select or combine the strategies, by
            name.
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
    """Learned parameters of another run, for an algorithm that builds on them.

    The user sets a constructor argument with this type hint to a run folder; the builder loads it.

    Attributes:
        run: Run folder, as the user wrote it.
        state: Parameters and buffers by name.
    """

    run: str
    state: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Share:
    """Tasks of one meta-update that are assigned to one of several processes.

    Attributes:
        first: Index of this process's first task among the tasks of the update.
        count: Number of tasks of this process.
        total: Number of tasks of the update.
    """

    first: int
    count: int
    total: int

    @classmethod
    def of(cls, total: int, rank: int, size: int) -> Share:
        """Return the share of process `rank` of `size`.

        Shares are contiguous, and their sizes differ by at most one task.
        """
        first = rank * total // size
        return cls(first, (rank + 1) * total // size - first, total)


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of training: `step` of `total` meta-updates are done.

    Attributes:
        share: Tasks of the update that are in this process's batch; None if the batch has all.
    """

    step: int
    total: int
    share: Share | None = None

    def first_task(self, num_tasks: int) -> int:
        """Return the index of a batch's first task in all of training, a key for random draws."""
        if self.share is None:
            return self.step * num_tasks
        return self.step * self.share.total + self.share.first

    @property
    def fraction(self) -> float:
        """Fraction of the updates that are done, in [0, 1)."""
        return self.step / self.total


@dataclass(frozen=True, slots=True)
class SourceSetup:
    """What a run gives to its data set, whichever it is: everything but the data set's options.

    Attributes:
        sizes: Size of the tasks of each split; the largest one of a split in `varying`.
        seed: Seed of the training tasks.
        eval_seed: Seed of the val and test tasks.
        device: Device on which the data are stored and tasks are generated.
        dtype: Precision of the rows.
        val_way: `eval.val_way` as the user has set it; None lets a data set with few val classes
            lower the way of val.
        varying: Sizes of the splits in which they vary.
        tasks_per_step: Number of training tasks that share a size, if sizes vary.
    """

    sizes: Mapping[Split, EpisodeSize]
    seed: int
    eval_seed: int
    device: torch.device
    dtype: torch.dtype
    val_way: int | None = None
    varying: Mapping[Split, VaryingSize] = field(default_factory=dict)
    tasks_per_step: int = 1

    @property
    def seeds(self) -> dict[Split, int]:
        """Seed of the tasks of each split."""
        return {"train": self.seed, "val": self.eval_seed, "test": self.eval_seed}


@dataclass(frozen=True, slots=True)
class BackboneSetup:
    """What a run gives to a backbone whose constructor names `setup`.

    Attributes:
        moments: Mean and standard deviation of each channel by which the data set normalizes its
            images, in [0, 1] units; None if it does not.
        fresh: Whether the run begins. If not, a checkpoint replaces all parameters, and no
            weights are read or downloaded.
    """

    moments: tuple[Sequence[float], Sequence[float]] | None = None
    fresh: bool = True


class EpisodeSource(Protocol):
    """A data set as an infinite sequence of tasks for each split.

    Its class takes a `SourceSetup` named `setup`, and its options as keywords.

    Attributes:
        spec: Kind and shapes of the tasks.
        sizes: Size of the tasks of each split; the largest one where sizes vary.
        device: Device of the tensors of a batch.
    """

    spec: TaskSpec
    sizes: dict[Split, EpisodeSize]
    device: torch.device

    def batch(self, split: Split, index: int, num_tasks: int) -> TaskBatch:
        """Return tasks `index … index + num_tasks - 1` of a split.

        The result is a pure function of the seed and the arguments: it equals the stack of the
        same tasks requested one by one. The tasks of a batch have one size. Where sizes vary, it
        is a function of (seed, step) in training and of (seed, split, index) at a test.
        """
        ...

    def fingerprint(self) -> str:
        """Return a hash of the data and their split, which a run records."""
        ...


class Parts(dict[str, "partial[EpisodeSource]"]):
    """Data sets that another one is made of, by name: their classes with their options.

    The node of the configuration has a node for each; a call with the setup builds one.
    """


@runtime_checkable
class HasSources(Protocol):
    """A data set whose tasks are of several others.

    Attributes:
        names: Names of these.
    """

    names: tuple[str, ...]

    def source_of(self, split: Split, index: int) -> int:
        """Return the position in `names` of the source of a task."""
        ...


@runtime_checkable
class HasLayouts(Protocol):
    """A data set whose tasks may differ in size; tasks of one layout can be in one batch."""

    def layout(self, split: Split, index: int) -> Hashable:
        """Return what the tasks of a batch have in common; None if all tasks of a split do."""
        ...


def layouts_differ(source: EpisodeSource, split: Split) -> bool:
    """Return whether not every two tasks of a split can be in one batch."""
    return isinstance(source, HasLayouts) and source.layout(split, 0) is not None


@runtime_checkable
class HasRowsOfClasses(Protocol):
    """A data set whose rows belong to classes, each class to one split."""

    def all_rows(self, split: Split, at_once: int = 250) -> Iterator[Tensor]:
        """Yield the inputs (n, *input_shape) of a split, without augmentation, class by class.

        Args:
            split: The split.
            at_once: Largest number of rows n.
        """
        ...

    def counts(self, split: Split) -> tuple[int, ...]:
        """Return the number of rows of each class of a split."""
        ...

    def class_names(self, split: Split) -> tuple[str, ...]:
        """Return the name of each class of a split."""
        ...


Record = dict[str, Any]
"""One entry of a log or of a results file."""
