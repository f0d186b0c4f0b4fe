"""Episodes from your own table: a task for each shop, user or patient, or for some classes.

Shapes: T tasks, W ways, R rows of a way, F features.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarun.core import seeding
from metarun.core.checks import at_least, pair
from metarun.core.types import SPLITS, EpisodeSize, SourceSetup, Split, TaskBatch, TaskSpec
from metarun.data.episodes import sample
from metarun.data.storage.table_files import Numbers
from metarun.data.table_rows import Groups, TableRows
from metarun.data.tables import (
    SLOT_ORDER,
    SLOT_QUERY,
    SLOT_ROWS,
    SLOT_SUPPORT,
    GroupedClasses,
    by_class,
    mixed,
    scaled,
    some_columns,
)

_LOG = logging.getLogger(__name__)
_SLOT_TASK, _SLOT_GROUPS, _SLOT_GROUP_ORDER = 50, 51, 52


class Rows(TableRows):
    """Tasks of few rows: `shot` of them as support and `query` others.

    With `task`, a training task is a random value of that column. In val and test, episode i is of
    value i in a fixed order, again and again, so that as many episodes as values test each once.
    In a classification a task has `way` of its classes, with labels in the order of the classes:
    with all of them, a label means the same everywhere. Without `task`, tasks have random classes
    in random order, or random rows. With `order`, the support rows of a task come before its
    queries.

    Args:
        setup: See `TableRows`.
        features: Smallest and largest number of columns of a task, for tables without a common
            meaning of columns: a task has random ones, standardized by its support rows, and the
            others are zero. None takes all columns, standardized by the training rows.
        classes: With `features` and without `task`, smallest and largest number of classes of a
            task, which are divided into `way` labels, as in `GroupedClasses`; None takes `way`.
        tasks: Number of different training tasks, which are repeated; None draws new ones without
            limit.
        **options: Those of `TableRows`.

    Raises:
        ValueError: A number is out of range, or options exclude each other; see `TableRows`.
    """

    def __init__(
        self,
        setup: SourceSetup,
        *,
        features: tuple[int, int] | None = None,
        classes: tuple[int, int] | None = None,
        tasks: int | None = None,
        **options: Any,
    ) -> None:
        at_least("data", 1, null="or null", tasks=tasks)
        if classes is not None and (features is None or options.get("task") is not None):
            raise ValueError("data.classes needs data.features=[2,8] and no data.task")
        if features is not None:
            features = pair("data.features", features, 1)
        self._common_columns = features is None
        super().__init__(setup, **options)
        self._features, self._num_tasks = features, tasks
        self._grouped_classes: GroupedClasses | None = None
        ways = {split: self.sizes[split].way for split in SPLITS}
        if self._classifies and self._task is None and setup.val_way is None:
            self._fit_val_way(ways)
        needed = {split: self.sizes[split].shot + self.sizes[split].query for split in SPLITS}
        self._check_ways(ways)
        self._groups = self.groups(needed, ways, by_class=self._classifies)
        self.notes_for_user = (self._summary(self._groups),)
        width = self._encoding.width if features is None else features[1]
        if features is not None and self._classifies and self._task is None:
            self._grouped_classes = self._as_tables(
                setup, features, classes or (ways["train"],) * 2
            )
        num_classes = len(self.class_names("train")) if self._classifies else None
        self.spec = TaskSpec(
            kind="classification" if self._classifies else "regression",
            input_shape=(width,),
            output_dim=ways["test"] if self._classifies else len(self._targets),
            train_way=ways["train"],
            num_train_classes=num_classes,
            train_shot=self.sizes["train"].shot if self._classifies else None,
        )
        if self._grouped_classes is not None:
            self.spec = self._grouped_classes.spec

    def batch(self, split: Split, index: int, num_tasks: int) -> TaskBatch:
        """Return tasks `index … index + num_tasks - 1` of a split."""
        if self._grouped_classes is not None:
            return self._grouped_classes.batch(split, index, num_tasks)
        groups, size = self._groups[split], self.sizes[split]
        numbers = torch.arange(index, index + num_tasks, device=self.device)
        if split == "train" and self._num_tasks is not None:
            numbers = numbers % self._num_tasks
        keys = seeding.fold(seeding.key(self._seeds[split], split), numbers)
        chosen = self._choose_groups(split, keys, numbers)
        picked = self._choose_rows(groups, keys, chosen, size)
        if self._classifies:
            return self._labeled(groups, keys, chosen, picked, size)
        picked = picked[:, 0]
        x = self._inputs(groups, keys, picked)
        y = groups.y[picked].to(self._dtype)
        support, query = x[:, : size.shot], x[:, size.shot :]
        if self._features is not None:
            support, query = scaled(support, query)
        return TaskBatch(
            support.to(self._dtype), y[:, : size.shot], query.to(self._dtype), y[:, size.shot :]
        )

    def _choose_groups(self, split: Split, keys: Tensor, numbers: Tensor) -> Tensor:
        """Draw the (T, W) groups of tasks."""
        groups, way = self._groups[split], self.sizes[split].way
        count = len(groups.tasks)
        task = seeding.integers(keys, _SLOT_TASK, count) if split == "train" else numbers % count
        if not self._classifies:
            return groups.first[task][:, None]
        chosen = sample(keys, _SLOT_GROUPS, groups.number[task], way)
        if self._task is None:
            order = seeding.bits(keys, _SLOT_GROUP_ORDER, (way,)).argsort(dim=-1, stable=True)
            chosen = chosen.gather(-1, order)
        else:
            chosen = chosen.sort(dim=-1).values
        return groups.first[task][:, None] + chosen

    def _choose_rows(
        self, groups: Groups, keys: Tensor, chosen: Tensor, size: EpisodeSize
    ) -> Tensor:
        """Draw (T, W, R) distinct rows of each group, the support first."""
        num_rows = size.shot + size.query
        per_group = keys[:, None]
        if self._classifies:
            per_group = seeding.fold(per_group, torch.arange(size.way, device=self.device))
        picked = sample(per_group, SLOT_ROWS, groups.counts[chosen], num_rows)
        if self._order is not None:
            picked = picked.sort(dim=-1).values
        else:
            order = seeding.bits(per_group, SLOT_ORDER, (num_rows,))
            picked = picked.gather(-1, order.argsort(dim=-1, stable=True))
        return picked + groups.starts[chosen][..., None]

    def _labeled(
        self, groups: Groups, keys: Tensor, chosen: Tensor, picked: Tensor, size: EpisodeSize
    ) -> TaskBatch:
        x = self._inputs(groups, keys, picked)
        support, support_y = mixed(keys, SLOT_SUPPORT, x[:, :, : size.shot])
        query, query_y = mixed(keys, SLOT_QUERY, x[:, :, size.shot :])
        if self._features is not None:
            support, query = scaled(support, query)
        return TaskBatch(
            support.to(self._dtype),
            support_y,
            query.to(self._dtype),
            query_y,
            class_ids=groups.class_ids[chosen],
        )

    def _inputs(self, groups: Groups, keys: Tensor, picked: Tensor) -> Tensor:
        """Return the (T, …, F) inputs of rows (T, …)."""
        if self._features is None:
            return groups.x[picked]
        return some_columns(groups.x, picked, keys, self._features)

    def _tensor(self, values: Numbers) -> Tensor:
        # Standardized by the support of a task, so in full precision until then.
        tensor = torch.from_numpy(values).to(self.device)
        return tensor if self._features is not None else tensor.to(self._dtype)

    def _fit_val_way(self, ways: dict[Split, int]) -> None:
        """Lower the way of val to its number of classes."""
        most, size = len(self._classes_of("val")), self.sizes["val"]
        if size.way <= most or most < 2:
            return
        _LOG.warning(
            "val has %d classes, fewer than way=%d: meta-val runs with way %d "
            "(eval.val_way sets it)",
            most,
            size.way,
            most,
        )
        ways["val"] = most
        self.sizes["val"] = EpisodeSize(most, size.shot, size.query)

    def _check_ways(self, ways: dict[Split, int]) -> None:
        keys = {"train": "train.way", "val": "eval.val_way", "test": "way"}
        for split in SPLITS:
            if (ways[split] > 1) != self._classifies:
                raise ValueError(
                    f"{keys[split]}={ways[split]} and way={ways['test']}: both are 1 in a "
                    "regression, and 2 or more in a classification"
                )
            most = len(self._classes_of(split)) if self._classifies else 1
            if ways[split] > most:
                raise ValueError(
                    f"{keys[split]}={ways[split]} is more than the {most} classes of "
                    f"{self._targets[0]} in {split}: set {keys[split]}={most} or less"
                )

    def _as_tables(
        self, setup: SourceSetup, features: tuple[int, int], classes: tuple[int, int]
    ) -> GroupedClasses:
        """Return the tasks of label groups and random columns."""
        assert self.labels is not None
        held = {}
        for split in SPLITS:
            names = self._classes_of(split)
            own = self._splits_of_rows == SPLITS.index(split)
            codes = [self.labels.names.index(name) for name in names]
            parts = [np.flatnonzero(own & (self.labels.codes == code)) for code in codes]
            kept = set(self._groups[split].class_ids.tolist())
            places = [place for place in range(len(names)) if place in kept]
            there = [one.name in self._columns_of[split] for one in self._encoding.inputs]
            used = np.repeat(there, [one.width for one in self._encoding.inputs])
            held[split] = [
                by_class(
                    Path(self._where).stem,
                    self._x[:, used],
                    [parts[place] for place in places],
                    [names[place] for place in places],
                    setup.device,
                )
            ]
        return GroupedClasses(
            setup, held=held, features=features, classes=classes, tasks=self._num_tasks
        )
