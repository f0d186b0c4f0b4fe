"""Few-shot tasks from the tables that come with scikit-learn.

Shapes: T tasks, W ways, C classes of a task, R rows of a way, F features of a row. A table has N
rows and its own number of columns.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarun.core import seeding
from metarun.core.checks import at_least, pair
from metarun.core.types import SPLITS, EpisodeSize, SourceSetup, Split, TaskBatch, TaskSpec
from metarun.data.episodes import sample

CLASSIFIED = ("iris", "wine", "breast_cancer", "digits")
"""Tables for classification."""
_SLOT_TABLE, _SLOT_CLASSES, _SLOT_SIDES, SLOT_ORDER, _SLOT_NUMBER, _SLOT_COLUMNS = range(6)
SLOT_ROWS, _SLOT_WAYS, SLOT_SUPPORT, SLOT_QUERY, _SLOT_COUNT = 6, 7, 8, 9, 10
_SIZE_KEYS: dict[Split, str] = {"train": "train.", "val": "", "test": ""}


@dataclass(frozen=True, slots=True)
class Held:
    """Part of a table that belongs to a split.

    Attributes:
        name: Name of the table.
        rows: (N, columns) rows, sorted by class.
        classes: Names of the classes.
        starts, counts: (classes,) index of the first row and number of rows of each class.
    """

    name: str
    rows: Tensor
    classes: tuple[str, ...]
    starts: Tensor
    counts: Tensor


class _Parts:
    """Base of the tasks that are random parts of tables.

    Args:
        setup: Sizes, seeds, device and precision; `val_way` is ignored.
        features: Smallest and largest number of columns of a task; F is the largest.
        tasks: Number of different training tasks, which are repeated; None draws new tasks
            without limit.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(self, setup: SourceSetup, *, features: tuple[int, int], tasks: int | None) -> None:
        at_least("data", 1, null="or null", tasks=tasks)
        self._features = pair("data.features", features, 1)
        self._tasks = tasks
        self._seeds = setup.seeds
        self._dtype = setup.dtype
        self.sizes = dict(setup.sizes)
        self.device = setup.device

    def _keys(self, split: Split, index: int, num_tasks: int) -> Tensor:
        """Return the (T,) keys of tasks of a split."""
        numbers = torch.arange(index, index + num_tasks, device=self.device)
        if split == "train" and self._tasks is not None:
            numbers = numbers % self._tasks
        return seeding.fold(seeding.key(self._seeds[split], split), numbers)


class GroupedClasses(_Parts):
    """Classification tasks from random classes, columns and rows of a table.

    A task uses one table of its split. Some of the table's classes are assigned at random to `way`
    label groups, each a union of one or more classes. With more classes than ways, the boundary
    between labels is rarely linear. A task uses some of the columns; its other features are zero.
    The rows of a label alternate between its classes. Features are standardized by the mean and
    standard deviation of the support rows.

    Args:
        setup: See `_Parts`.
        held: The tables of each split. No class is in two splits.
        classes: Smallest and largest number of classes of a task.
        features, tasks: See `_Parts`.

    Raises:
        ValueError: A table is too small, or a number is out of range.
    """

    def __init__(
        self,
        setup: SourceSetup,
        *,
        held: Mapping[Split, Sequence[Held]],
        features: tuple[int, int],
        classes: tuple[int, int],
        tasks: int | None,
    ) -> None:
        super().__init__(setup, features=features, tasks=tasks)
        self._classes = pair("data.classes", classes, 2)
        self._held = held
        for split in SPLITS:
            self._check(split)
        grouped = self._classes[1] > self.sizes["train"].way
        total = sum(len(held.classes) for held in self._held["train"])
        self.spec = TaskSpec(
            kind="classification",
            input_shape=(self._features[1],),
            output_dim=self.sizes["test"].way,
            train_way=self.sizes["train"].way,
            num_train_classes=None if grouped else total,
            train_shot=self.sizes["train"].shot,
        )

    def batch(self, split: Split, index: int, num_tasks: int) -> TaskBatch:
        """Return tasks `index … index + num_tasks - 1` of a split.

        `class_ids` holds the first class of each way, numbered over the split's tables.
        """
        keys = self._keys(split, index, num_tasks)
        held = self._held[split]
        table = seeding.integers(keys, _SLOT_TABLE, len(held))
        size = self.sizes[split]
        rows = keys.new_zeros(
            (num_tasks, size.way, size.shot + size.query, self._features[1]), dtype=torch.float64
        )
        first = keys.new_zeros(num_tasks, size.way)
        offset = 0
        for number, own in enumerate(held):
            here = (table == number).nonzero()[:, 0]
            if len(here):
                rows[here], named = self._draw(own, keys[here], size)
                first[here] = named + offset
            offset += len(own.classes)
        support, support_y = mixed(keys, SLOT_SUPPORT, rows[:, :, : size.shot])
        query, query_y = mixed(keys, SLOT_QUERY, rows[:, :, size.shot :])
        support, query = scaled(support, query)
        return TaskBatch(
            support.to(self._dtype), support_y, query.to(self._dtype), query_y, class_ids=first
        )

    def class_names(self, split: Split) -> tuple[str, ...]:
        """Return the names of the classes that `class_ids` numbers, such as `iris/setosa`."""
        return tuple(f"{own.name}/{name}" for own in self._held[split] for name in own.classes)

    def fingerprint(self) -> str:
        """Return a hash of every split's rows and classes and of the sampling options."""
        digest = hashlib.sha256(repr((self._features, self._classes)).encode())
        for split in SPLITS:
            for own in self._held[split]:
                digest.update(repr((split, own.name, own.classes)).encode())
                digest.update(own.rows.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _draw(self, own: Held, keys: Tensor, size: EpisodeSize) -> tuple[Tensor, Tensor]:
        """Draw the (T, W, R, F) rows of tasks of one table, and the (T, W) first classes."""
        most = min(self._classes[1], len(own.classes))
        fewest = max(self._classes[0], size.way)
        num_rows = size.shot + size.query
        chosen = seeding.choose(keys, _SLOT_CLASSES, len(own.classes), most)
        number = fewest + seeding.integers(keys, _SLOT_NUMBER, most - fewest + 1)
        place = torch.arange(most, device=self.device)
        # Every way has one class; further classes go to random ways; the rest is not used.
        side = seeding.integers(keys, _SLOT_SIDES, size.way, (most,))
        side = torch.where(place < size.way, place, side)
        side = torch.where(place < number[:, None], side, size.way)
        way = torch.arange(size.way, device=self.device)
        of_way = side[:, None] == way[:, None]
        group_size = of_way.sum(2, keepdim=True)
        turns = torch.arange(num_rows, device=self.device)
        # The class of each row of a way, and its row in that class, without repetition.
        order = (~of_way).to(torch.int8).argsort(dim=2, stable=True)
        classes = order.gather(2, turns % group_size)
        per_class = seeding.fold(keys[:, None], chosen)
        rows = sample(per_class, SLOT_ROWS, own.counts[chosen], num_rows)
        shuffle = seeding.bits(per_class, SLOT_ORDER, (num_rows,)).argsort(dim=-1, stable=True)
        rows = rows.gather(-1, shuffle) + own.starts[chosen][..., None]
        times = turns // group_size
        picked = rows.flatten(1).gather(1, (classes * num_rows + times).flatten(1))
        picked = picked.unflatten(1, (size.way, num_rows))
        shuffle = seeding.bits(keys, _SLOT_WAYS, (size.way, num_rows)).argsort(dim=-1, stable=True)
        picked = picked.gather(-1, shuffle)
        return some_columns(own.rows, picked, keys, self._features), chosen[:, : size.way]

    def _check(self, split: Split) -> None:
        """Check that the tables of a split have enough classes and rows for a task."""
        size = self.sizes[split]
        way_key = f"{_SIZE_KEYS[split]}way"
        if self._classes[1] < size.way:
            raise ValueError(
                f"{way_key}={size.way} is more than the {self._classes[1]} classes of a task: "
                f"set data.classes=[{size.way},{size.way}]"
            )
        for own in self._held[split]:
            fewest = max(self._classes[0], size.way)
            if len(own.classes) < fewest:
                raise ValueError(
                    f"data.{split} has {len(own.classes)} classes of {own.name}, a task needs "
                    f"{fewest} or more: lower {way_key} or data.classes"
                )
            needed, count = size.shot + size.query, int(own.counts.min())
            if count < needed:
                name = own.classes[int(own.counts.argmin())]
                raise ValueError(
                    f"{name} of {own.name} has {count} rows, {size.shot}+{size.query} are needed: "
                    f"lower {_SIZE_KEYS[split]}shot or {_SIZE_KEYS[split]}query"
                )


class Tables(GroupedClasses):
    """Tasks of `GroupedClasses` from the tables that come with scikit-learn.

    No class, and therefore no row, is in two splits.

    Args:
        setup: See `_Parts`.
        train, val, test: Contents of each split: names of tables, or some classes of a table,
            such as `digits:0-5` or `digits:0+3`.
        features, classes, tasks: See `GroupedClasses`.

    Raises:
        ValueError: A table is unknown or too small, a class is in two splits, a number is out of
            range, or scikit-learn is missing.
    """

    def __init__(
        self,
        setup: SourceSetup,
        *,
        train: Sequence[str] = ("digits:0-6", "wine"),
        val: Sequence[str] = ("digits:7-9",),
        test: Sequence[str] = ("iris", "breast_cancer"),
        features: tuple[int, int] = (2, 8),
        classes: tuple[int, int] = (2, 6),
        tasks: int | None = None,
    ) -> None:
        named: dict[Split, Sequence[str]] = {"train": train, "val": val, "test": test}
        held = {split: _load(split, named[split], setup.device) for split in SPLITS}
        _check_apart(held)
        super().__init__(setup, held=held, features=features, classes=classes, tasks=tasks)


def _load(split: Split, named: Sequence[str], device: torch.device) -> list[Held]:
    if not named:
        raise ValueError(f"data.{split}=[]: expected names of tables: {', '.join(CLASSIFIED)}")
    return [_one(split, word, device) for word in named]


def _one(split: Split, word: str, device: torch.device) -> Held:
    """Load a table, or the classes of it that are listed after a colon."""
    name, _, some = word.partition(":")
    if name not in CLASSIFIED:
        raise ValueError(f"data.{split}: table {name} is unknown, expected {', '.join(CLASSIFIED)}")
    rows, labels, names = table(name)
    try:
        wanted = _numbers(some) if some else list(range(len(names)))
        parts = [np.flatnonzero(labels == label) for label in wanted]
        chosen = tuple(names[label] for label in wanted)
    except (ValueError, IndexError):
        raise ValueError(
            f"data.{split}: {word} does not name classes of {name}: expected "
            f"{name}:FIRST-LAST or {name}:A+B, with numbers from 0 to {len(names) - 1}"
        ) from None
    return by_class(name, rows, parts, chosen, device)


def by_class(
    name: str,
    rows: Any,
    parts: Sequence[Any],
    classes: Sequence[str],
    device: torch.device,
) -> Held:
    """Return a table with its rows sorted by class.

    Args:
        name: Name of the table.
        rows: (N, columns) numbers.
        parts: Numbers of the rows of each class.
        classes: Names of the classes.
        device: Where the rows are kept.
    """
    counts = torch.tensor([len(part) for part in parts])
    return Held(
        name,
        torch.from_numpy(rows[np.concatenate(parts)]).to(device),
        tuple(classes),
        (counts.cumsum(0) - counts).to(device),
        counts.to(device),
    )


class Diabetes(_Parts):
    """Regression of disease progression on random columns, for random patients.

    The 442 patients have a fixed split: 60 % for training, 20 % each for val and test. Targets are
    standardized by the mean and standard deviation of the training patients, features by those of
    the support rows.

    Args:
        features: Smallest and largest number of columns of a task; the table has ten.
        tasks: See `_Parts`.

    Raises:
        ValueError: A number is out of range, or scikit-learn is missing.
    """

    def __init__(
        self,
        setup: SourceSetup,
        *,
        features: tuple[int, int] = (2, 10),
        tasks: int | None = None,
    ) -> None:
        super().__init__(setup, features=features, tasks=tasks)
        rows, targets, _ = table("diabetes")
        order = np.random.default_rng(0).permutation(len(rows))
        cuts = np.split(order, [int(0.6 * len(rows)), int(0.8 * len(rows))])
        mean, deviation = targets[cuts[0]].mean(), targets[cuts[0]].std()
        self._rows, self._targets = {}, {}
        for split, part in zip(SPLITS, cuts, strict=True):
            size = self.sizes[split]
            if size.way != 1:
                raise ValueError(
                    f"{_SIZE_KEYS[split]}way={size.way} has no meaning in a regression: leave it "
                    "at 1"
                )
            if size.shot + size.query > len(part):
                raise ValueError(
                    f"{split} has {len(part)} patients, {size.shot}+{size.query} are needed: "
                    f"lower {_SIZE_KEYS[split]}shot or {_SIZE_KEYS[split]}query"
                )
            self._rows[split] = torch.from_numpy(rows[part]).to(self.device)
            scaled_targets = (targets[part] - mean) / deviation
            self._targets[split] = torch.from_numpy(scaled_targets).to(self.device)
        self.spec = TaskSpec(
            kind="regression",
            input_shape=(self._features[1],),
            output_dim=1,
            train_way=1,
        )

    def batch(self, split: Split, index: int, num_tasks: int) -> TaskBatch:
        """Return tasks `index … index + num_tasks - 1` of a split."""
        keys = self._keys(split, index, num_tasks)
        size = self.sizes[split]
        rows = self._rows[split]
        counts = torch.full_like(keys, len(rows))
        picked = sample(keys, SLOT_ROWS, counts, size.shot + size.query)
        shuffle = seeding.bits(keys, SLOT_ORDER, picked.shape[1:]).argsort(dim=-1, stable=True)
        picked = picked.gather(1, shuffle)
        x = some_columns(rows, picked, keys, self._features)
        y = self._targets[split][picked][..., None].to(self._dtype)
        support, query = scaled(x[:, : size.shot], x[:, size.shot :])
        return TaskBatch(
            support.to(self._dtype), y[:, : size.shot], query.to(self._dtype), y[:, size.shot :]
        )

    def fingerprint(self) -> str:
        """Return a hash of every split's rows and of the sampling options."""
        digest = hashlib.sha256(repr(self._features).encode())
        for split in SPLITS:
            for part in (self._rows[split], self._targets[split]):
                digest.update(part.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


@lru_cache
def table(name: str) -> tuple[Any, Any, tuple[str, ...]]:
    """Load a table of scikit-learn.

    Returns:
        (N, columns) rows, (N,) labels or values, and the names of the classes.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError:
        raise ValueError("tables come with scikit-learn: pip install 'metarun[sklearn]'") from None
    bunch = getattr(datasets, f"load_{name}")()
    names = tuple(str(one) for one in getattr(bunch, "target_names", ()))
    return np.asarray(bunch.data, dtype=np.float64), np.asarray(bunch.target), names


def some_columns(rows: Tensor, picked: Tensor, keys: Tensor, bounds: tuple[int, int]) -> Tensor:
    """Select random columns for each task, padded with zeros to F features.

    Args:
        rows: (N, columns) rows of the table.
        picked: (T, …) indices of each task's rows.
        keys: (T,) keys of the tasks.
        bounds: Smallest and largest number of columns of a task; F is the largest.

    Returns:
        (T, …, F) features of the picked rows.
    """
    width, columns = bounds[1], rows.shape[1]
    most = min(width, columns)
    fewest = min(bounds[0], most)
    number = fewest + seeding.integers(keys, _SLOT_COUNT, most - fewest + 1)
    chosen = seeding.choose(keys, _SLOT_COLUMNS, columns, most)
    seen = (torch.arange(most, device=keys.device) < number[:, None]).to(rows.dtype)
    shape = (len(keys), *(1 for _ in picked.shape[1:]), most)
    index = chosen.reshape(shape).expand(*picked.shape, most)
    values = rows[picked].gather(-1, index) * seen.reshape(shape)
    return torch.nn.functional.pad(values, (0, width - most))


def scaled(support: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Standardize (T, R, F) features by mean and deviation of the support rows.

    Features that are constant in the support become zero.
    """
    mean = support.mean(1, keepdim=True)
    deviation = (support - mean).square().mean(1, keepdim=True).sqrt()
    unit = torch.where(deviation > 1e-9, deviation, 1.0)
    varies = deviation > 1e-9
    return (support - mean) / unit, torch.where(varies, (query - mean) / unit, 0.0)


def mixed(keys: Tensor, slot: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Shuffle rows (T, W, R, F) to (T, W R, F) and return them with their (T, W R) labels."""
    _, ways, num, width = rows.shape
    order = seeding.bits(keys, slot, (ways * num,)).argsort(dim=-1, stable=True)
    flat = rows.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, width))
    return flat, order // max(num, 1)


def _numbers(words: str) -> list[int]:
    """Parse `0-5` or `0+3` to a list of distinct numbers."""
    found: list[int] = []
    for word in words.split("+"):
        first, dash, last = word.partition("-")
        found += range(int(first), int(last if dash else first) + 1)
    if not found or len(set(found)) < len(found):
        raise ValueError(words)
    return found


def _check_apart(held: Mapping[Split, Sequence[Held]]) -> None:
    """Check that no class is in two splits, or in one split twice."""
    places = [
        (split, f"{own.name}/{n}") for split in SPLITS for own in held[split] for n in own.classes
    ]
    for (one, name), (other, same) in combinations(places, 2):
        if name == same:
            raise ValueError(
                f"{name} is in data.{one} and in data.{other}: splits must not share classes; "
                "name some classes, as digits:0-5, or other tables"
                if one != other
                else f"{name} is in data.{one} twice"
            )
