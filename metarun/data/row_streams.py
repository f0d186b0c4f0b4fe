"""Streams of the rows of your own table, in their order.

Shapes: T streams, J tasks in each, S rows of a visit, Q held-out rows of a task.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metarun.core import seeding
from metarun.core.checks import at_least
from metarun.core.types import SPLITS, SourceSetup, Split, Stream, TaskBatch, TaskSpec
from metarun.data.storage.table_files import Columns, Texts
from metarun.data.table_rows import TableRows

_SLOT_TASKS, _SLOT_START = 60, 61


class RowStream(TableRows):
    """Streams that visit tasks of a table one after another, each once.

    A visit shows `shot` rows of a task that follow each other in the order of the column `order`,
    from a random one on. The `query` rows after them are held out. Without a column of tasks the
    table is one task, whose splits follow each other in that order. Labels are those of the whole
    table.

    Args:
        setup: See `TableRows`; `way` is the number of classes, and 1 in a regression.
        tasks: Number of tasks J of a stream.
        rows: Number of rows that arrive together in one step; `shot` is a multiple of it.
        task_ids_known: Whether the learner is given the task of each row.
        **options: Those of `TableRows`; `order` is required.

    Raises:
        ValueError: A number is out of range; see `TableRows`.
    """

    def __init__(
        self,
        setup: SourceSetup,
        *,
        tasks: int = 5,
        rows: int = 1,
        task_ids_known: bool = True,
        **options: Any,
    ) -> None:
        at_least("data", 1, tasks=tasks, rows=rows)
        if options.get("order") is None:
            raise ValueError("data.order=COLUMN is missing: expected that of the order of the rows")
        super().__init__(setup, **options)
        self._check_ways()
        needed = {split: self.sizes[split].shot + self.sizes[split].query for split in SPLITS}
        self._groups = self.groups(needed, dict.fromkeys(SPLITS, 1), by_class=False)
        self._num_tasks = 1 if self._task is None else tasks
        streams = {split: self._layout(split, rows, task_ids_known) for split in SPLITS}
        self.notes_for_user = (self._summary(self._groups),)
        num_classes = None if self.labels is None else len(self.labels.names)
        self.spec = TaskSpec(
            kind="regression" if num_classes is None else "classification",
            input_shape=(self._encoding.width,),
            output_dim=len(self._targets) if num_classes is None else num_classes,
            train_way=self.sizes["train"].way,
            streams=streams,
        )

    def batch(self, split: Split, index: int, num_tasks: int) -> TaskBatch:
        """Return streams `index … index + num_tasks - 1` of a split."""
        groups, size = self._groups[split], self.sizes[split]
        keys = seeding.task_keys(self._seeds[split], split, index, num_tasks, self.device)
        chosen = seeding.choose(keys, _SLOT_TASKS, len(groups.starts), self._num_tasks)
        length = size.shot + size.query
        free = groups.counts[chosen] - length + 1
        start = (seeding.bits(keys, _SLOT_START, (self._num_tasks,)) & (2**62 - 1)) % free
        first = groups.starts[chosen] + start
        rows = first[..., None] + torch.arange(length, device=self.device)
        parts = rows[..., : size.shot].flatten(1), rows[..., size.shot :].flatten(1)
        class_ids: Tensor | None = None
        if self.labels is not None:
            classes = torch.arange(len(self.labels.names), device=self.device)
            class_ids = classes.expand(num_tasks, -1)
        support, query = parts
        return TaskBatch(
            groups.x[support], groups.y[support], groups.x[query], groups.y[query], class_ids
        )

    def _layout(self, split: Split, rows: int, task_ids_known: bool) -> Stream:
        size, count = self.sizes[split], len(self._groups[split].starts)
        if count < self._num_tasks:
            raise ValueError(
                f"data.tasks={self._num_tasks} is more than the {count} values of {self._task} in "
                f"{split}: lower it"
            )
        if size.shot % rows:
            key = "train.shot" if split == "train" else "shot"
            raise ValueError(
                f"data.rows={rows} does not divide {key}={size.shot}, the rows of a visit: choose "
                "a divisor"
            )
        visits = tuple(range(self._num_tasks))
        return Stream(visits, size.shot // rows, rows, size.query, task_ids_known)

    def _units(self, table: Columns) -> Texts | None:
        return super()._units(table) if self._task is not None else None

    def _classes_of(self, split: Split) -> tuple[str, ...]:  # noqa: ARG002
        assert self.labels is not None
        return self.labels.names

    def _check_ways(self) -> None:
        number = 1 if self.labels is None else len(self.labels.names)
        for split in SPLITS:
            way = self.sizes[split].way
            if way != number:
                key = {"train": "train.way", "val": "eval.val_way", "test": "way"}[split]
                what = "no classes" if self.labels is None else f"{number} classes"
                raise ValueError(
                    f"{key}={way}: the table has {what}, all of them in every stream: type "
                    f"{key}={number}"
                )
