"""Streams of tasks over families of functions and over image classes.

A stream is one entry of a batch: its support rows are the rows of the stream in order, and its
query rows are held-out rows of its tasks. `metarun.core.types.Stream` describes the layout.

Shapes: T streams, J tasks in each, V visits to tasks, S rows of a stream, Q held-out rows of a
task, M remembered rows, W classes of a stream, K rows of a class, N outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from metarun.core import seeding
from metarun.core.checks import at_least
from metarun.core.types import SPLITS, EpisodeSize, SourceSetup, Split, Stream, TaskBatch
from metarun.data.episodes import ClassEpisodes
from metarun.data.folder import Folder
from metarun.data.omniglot import Omniglot, OmniglotSmall
from metarun.data.synthetic import Formulas, Linear, Sinusoid

Order = Literal["once", "returning", "drifting"]
ORDERS: tuple[Order, ...] = ("once", "returning", "drifting")

_SLOT_STREAM_X, _SLOT_QUERY_X, _SLOT_FUNCTION = 20, 21, 22
_SLOT_SHUFFLE, _SLOT_REMEMBERED_CLASS, _SLOT_REMEMBERED_IMAGE = 23, 24, 25
_KEY_STREAM, _KEY_HELD_OUT = 102, 103


class FunctionStream(Formulas):
    """Streams over a family of functions; a mixin for the class of the family.

    A task is a function. `shot` is the number of rows of a visit, `query` the number of held-out
    rows of a task.

    Args:
        tasks: Number of functions J of a stream.
        rows: Number of rows that arrive together in one step; `shot` is a multiple of it.
        order: Order of the visits. `once` visits each task once. `returning` visits all tasks
            `visits` times, in a new order in each round after the first. `drifting` moves the
            parameters in equal steps from one function to the next during a task; the task's
            held-out rows are of its last function.
        visits: Number of visits to each task with `order=returning`.
        task_ids_known: Whether the learner is given the task of each row.
        indexed: Whether to prepend the task's index to each input, one-hot.
        functions: Number of different training functions; None draws new ones without limit.
        **options: Options of the family.

    Raises:
        ValueError: A number is out of range, or an option is unknown.
    """

    def __init__(
        self,
        setup: SourceSetup,
        *,
        tasks: int = 10,
        rows: int = 1,
        order: Order = "once",
        visits: int = 3,
        task_ids_known: bool = True,
        indexed: bool = False,
        functions: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(setup, **options)
        at_least("data", 1, tasks=tasks, rows=rows, visits=visits)
        if functions is not None and functions < tasks:
            raise ValueError(
                f"data.functions={functions} is fewer than data.tasks={tasks}: a stream needs "
                "that many different functions"
            )
        if functions is not None and order == "drifting":
            raise ValueError("data.functions does not apply to data.order=drifting: leave it out")
        self._order = order
        self._task_ids_known = task_ids_known
        self._indexed = indexed
        self._functions = functions
        visited = _visits(tasks, visits if order == "returning" else 1)
        shape = (tasks + 1,) if indexed else (1,)
        streams = {split: self._layout(split, visited, rows) for split in SPLITS}
        self.spec = replace(self.spec, streams=streams, input_shape=shape)

    def batch(self, split: Split, index: int, num_tasks: int) -> TaskBatch:
        """Return streams `index … index + num_tasks - 1` of a split."""
        assert self.spec.streams is not None
        stream = self.spec.streams[split]
        keys = seeding.task_keys(self._seeds[split], split, index, num_tasks, self.device)
        visits = torch.tensor(stream.visits, device=self.device)
        of_row = visits.repeat_interleave(stream.steps * stream.rows)
        of_query = torch.arange(stream.num_tasks, device=self.device)
        of_query = of_query.repeat_interleave(stream.queries)
        functions = self._drawn(split, keys, stream.num_tasks + (self._order == "drifting"))
        support = [parameter[:, of_row] for parameter in functions]
        query = [parameter[:, of_query] for parameter in functions]
        if self._order == "drifting":
            ends = [parameter[:, of_row + 1] for parameter in functions]
            share = self._way_there(stream)
            pairs = zip(support, ends, strict=True)
            support = [torch.lerp(begin, end, share) for begin, end in pairs]
            query = [parameter[:, of_query + 1] for parameter in functions]
        return TaskBatch(
            *self._points(keys, _SLOT_STREAM_X, support, of_row, _KEY_STREAM),
            *self._points(keys, _SLOT_QUERY_X, query, of_query, _KEY_HELD_OUT),
        )

    def _facts(self) -> tuple[float, ...]:
        assert self.spec.streams is not None
        stream = self.spec.streams["test"]
        own = (
            ORDERS.index(self._order),
            stream.task_ids_known,
            self._indexed,
            stream.steps,
            stream.rows,
        )
        family = super()._facts()  # type: ignore[safe-super]
        return (*family, *own, stream.queries, *stream.visits)

    def _layout(self, split: Split, visits: tuple[int, ...], rows: int) -> Stream:
        size = self.sizes[split]
        _check_rows(split, size, rows, size.shot)
        return Stream(visits, size.shot // rows, rows, size.query, self._task_ids_known)

    def _drawn(self, split: Split, keys: Tensor, count: int) -> list[Tensor]:
        """Draw the (T, count) parameters of each stream's functions."""
        places = torch.arange(count, device=self.device)
        owners = seeding.fold(keys[:, None], places)
        if split == "train" and self._functions is not None:
            chosen = seeding.choose(keys, _SLOT_FUNCTION, self._functions, count)
            owners = seeding.fold(seeding.key(self._seeds["train"], "function"), chosen)
        return list(self._parameters(owners))

    def _way_there(self, stream: Stream) -> Tensor:
        """Return the (S,) position of each row between two functions of a drift, in [0, 1)."""
        step = torch.arange(stream.steps, device=self.device, dtype=torch.float64) / stream.steps
        return step.repeat_interleave(stream.rows).repeat(len(stream.visits))

    def _points(
        self,
        keys: Tensor,
        slot: int,
        parameters: Sequence[Tensor],
        tasks: Tensor,
        purpose: int,
    ) -> tuple[Tensor, Tensor]:
        """Draw the rows of all streams.

        Args:
            keys: (T,) keys of the streams.
            slot: Slot of the draw of the inputs.
            parameters: (T, R) parameters of each row's function.
            tasks: (R,) task of each row.
            purpose: Number that separates the noise of stream rows and held-out rows.

        Returns:
            (T, R, …) inputs and (T, R, 1) values.
        """
        low, high = self._x
        shape = (len(tasks),)
        z = seeding.uniform(keys, slot, shape, low=low, high=high, dtype=self._dtype)
        values = self._values(parameters, z.double())[..., None]
        y = self._noisy(values, seeding.fold(keys, torch.tensor(purpose, device=self.device)))
        x = z[..., None]
        if self._indexed:
            index = torch.nn.functional.one_hot(tasks, self.spec.input_shape[0] - 1)
            x = torch.cat([index.to(self._dtype).expand(len(keys), -1, -1), x], -1)
        return x, y


class SinusoidStream(FunctionStream, Sinusoid):
    """Streams of sinusoids."""


class LinearStream(FunctionStream, Linear):
    """Streams of lines."""


class ClassStream(ClassEpisodes):
    """Streams that visit classes one after another, each once; a mixin for an image data set.

    A stream is a `way`-way episode with `shot` images of each class in the stream and `query`
    held-out images. The classes arrive in random order, and those of one task are mixed. A label
    is the position of the class in that order. In training it is the number of the class in the
    training split, as in the code of Javed & White (2019). The query can then have rows of other
    classes.

    Args:
        classes_per_task: Number of classes that arrive mixed with each other; None mixes all. A
            stream with fewer classes is one task.
        rows: Number of rows that arrive together in one step.
        remember: Number of random rows, drawn from all training classes, that are appended to
            the query of a training stream.
        task_ids_known: Whether the learner is given the task of each row.
        **options: Options of the image data set.

    Raises:
        ValueError: A number is out of range.
    """

    least_way = 1
    sizes_may_vary = False

    def __init__(
        self,
        setup: SourceSetup,
        *,
        classes_per_task: int | None = 1,
        rows: int = 1,
        remember: int = 0,
        task_ids_known: bool = True,
        **options: Any,
    ) -> None:
        at_least("data", 1, null="or null for all", classes_per_task=classes_per_task)
        at_least("data", 1, rows=rows)
        at_least("data", 0, remember=remember)
        super().__init__(setup, **options)
        self._remember = remember
        self._classes_per_task = classes_per_task
        self._task_ids_known = task_ids_known
        streams = {split: self._layout(split, rows) for split in SPLITS}
        ways = [self.num_classes("train"), *(self.sizes[split].way for split in SPLITS)]
        self.spec = replace(self.spec, streams=streams, output_dim=max(ways))

    def batch(self, split: Split, index: int, num_tasks: int) -> TaskBatch:
        """Return streams `index … index + num_tasks - 1` of a split."""
        size = self.sizes[split]
        data = self._on_device(split)
        keys = seeding.task_keys(self._seeds[split], split, index, num_tasks, self.device)
        picks, class_ids = self._pick(split, data, keys, size)
        labels = torch.arange(size.way, device=self.device).expand(num_tasks, -1)
        labels = class_ids if split == "train" else labels
        support = self._mixed(keys, picks[..., : size.shot], labels)
        query = self._by_class(picks[..., size.shot :], labels)
        if split == "train" and self._remember:
            query = [
                torch.cat(pair, 1) for pair in zip(query, self._remembered(data, keys), strict=True)
            ]
        streaming, held_out = (
            seeding.fold(keys, torch.tensor(purpose, device=self.device))
            for purpose in (_KEY_STREAM, _KEY_HELD_OUT)
        )
        return TaskBatch(
            self._inputs(split, data, streaming, support[0]),
            support[1],
            self._inputs(split, data, held_out, query[0]),
            query[1],
            class_ids,
        )

    def fingerprint(self) -> str:
        """Return a hash of every split's classes and images and of the test stream's layout."""
        assert self.spec.streams is not None
        facts = f"{super().fingerprint()};{self.spec.streams['test']}"
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def _layout(self, split: Split, rows: int) -> Stream:
        size = self.sizes[split]
        together = min(self._classes_per_task or size.way, size.way)
        if size.way % together:
            raise ValueError(
                f"data.classes_per_task={together} does not divide the {size.way} classes of a "
                f"{split} stream: choose another value, or another number of ways"
            )
        _check_rows(split, size, rows, together * size.shot)
        return Stream(
            visits=tuple(range(size.way // together)),
            steps=together * size.shot // rows,
            rows=rows,
            queries=together * size.query,
            task_ids_known=self._task_ids_known,
        )

    def _by_class(self, picks: Tensor, labels: Tensor) -> list[Tensor]:
        """Return the (T, W K) images and labels of picks (T, W, K), grouped by class."""
        return [picks.flatten(1), labels[..., None].expand_as(picks).flatten(1)]

    def _mixed(self, keys: Tensor, picks: Tensor, labels: Tensor) -> list[Tensor]:
        """Return the same as `_by_class`, with the rows of each task in random order."""
        parts = self._by_class(picks, labels)
        classes = min(self._classes_per_task or picks.shape[1], picks.shape[1])
        together = classes * picks.shape[2]
        shape = (picks.shape[1] // classes, together)
        order = seeding.bits(keys, _SLOT_SHUFFLE, shape).argsort(dim=-1, stable=True)
        return [part.unflatten(1, (-1, together)).gather(2, order).flatten(1) for part in parts]

    def _remembered(self, data: Any, keys: Tensor) -> list[Tensor]:
        """Draw (T, M) images and labels, uniformly over the training classes."""
        count = (self._remember,)
        labels = seeding.integers(keys, _SLOT_REMEMBERED_CLASS, self.num_classes("train"), count)
        classes, turns = labels % len(data.counts), labels // len(data.counts)
        number = seeding.bits(keys, _SLOT_REMEMBERED_IMAGE, count) & (2**62 - 1)
        picks = data.starts[classes] + number % data.counts[classes] + turns * data.num_images
        return [picks, labels]


class OmniglotSmallStream(ClassStream, OmniglotSmall):
    """Streams over the characters that ship with the package."""


class OmniglotStream(ClassStream, Omniglot):
    """Streams over all of Omniglot."""


class FolderStream(ClassStream, Folder):
    """Streams over a user's own images, class after class or shuffled."""


def _visits(tasks: int, rounds: int) -> tuple[int, ...]:
    """Return the task of each visit: in order in the first round, in a new order in later ones."""
    visits = list(range(tasks))
    for number in range(1, rounds):
        for attempt in range(100):
            words = ("visits", number, attempt) if attempt else ("visits", number)
            key = torch.tensor(seeding.key(*words))
            following = seeding.choose(key, 0, tasks, tasks).tolist()
            if following[0] == visits[-1]:
                following = following[1:] + following[:1]
            # With two tasks no other order avoids two visits to the same task in a row.
            if following != visits[-tasks:]:
                break
        visits += following
    return tuple(visits)


def _check_rows(split: Split, size: EpisodeSize, rows: int, visit: int) -> None:
    """Check that a visit is a whole number of steps."""
    if visit % rows:
        key = "train.shot" if split == "train" else "shot"
        raise ValueError(
            f"data.rows={rows} does not divide the {visit} rows of a visit ({key}={size.shot}): "
            "choose a divisor"
        )
