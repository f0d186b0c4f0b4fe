"""Few-shot tasks from the tables that come with scikit-learn.

Shapes: T tasks, W ways, C classes of a task, R rows of a way, F features of a row; a table has N
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
from metarun.core.types import SPLITS, EpisodeSize, Split, TaskBatch, TaskSpec
from metarun.data.episodes import sample

CLASSIFIED = ("iris", "wine", "breast_cancer", "digits")
"""Tables whose rows have classes."""
_SLOT_TABLE, _SLOT_CLASSES, _SLOT_SIDES, _SLOT_ORDER, _SLOT_NUMBER, _SLOT_COLUMNS = range(6)
_SLOT_ROWS, _SLOT_WAYS, _SLOT_SUPPORT, _SLOT_QUERY, _SLOT_COUNT = 6, 7, 8, 9, 10
_SIZE_KEYS: dict[Split, str] = {"train": "train.", "val": "", "test": ""}


@dataclass(frozen=True, slots=True)
class _Held:
    """What a split has of a table.

    Attributes:
        name: Of the table.
        rows: (N, columns), sorted by class.
        classes: Names of the classes.
        starts, counts: (classes,) first row and number of rows of each.
    """

    name: str
    rows: Tensor
    classes: tuple[str, ...]
    starts: Tensor
    counts: Tensor


class _Parts:
    """Tasks that are parts of tables.

    Args:
        features: Fewest and most columns of a task; F is the most.
        tasks: Number of training tasks, which come again and again; None draws ever new ones.
        sizes: Rows of a task of each split.
        seed, eval_seed: Of training tasks, and of the others.
        device: Where tasks are made.
        dtype: Precision of their rows.
        val_way: `eval.val_way`.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        *,
        features: tuple[int, int],
        tasks: int | None = None,
        sizes: Mapping[Split, EpisodeSize],
        seed: int,
        eval_seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        val_way: int | None = None,  # noqa: ARG002
    ) -> None:
        if tasks is not None and tasks < 1:
            raise ValueError(f"data.tasks={tasks}: expected 1 or more, or null")
        self._features = check_pair("features", features, 1)
        self._tasks = tasks
        self._seeds: dict[Split, int] = {"train": seed, "val": eval_seed, "test": eval_seed}
        self._dtype = dtype
        self.sizes: dict[Split, EpisodeSize] = dict(sizes)
        self.device = torch.device(device)

    def _keys(self, split: Split, index: int, num_tasks: int) -> Tensor:
        """(T,) keys of tasks of a split."""
        numbers = torch.arange(index, index + num_tasks, device=self.device)
        if split == "train" and self._tasks is not None:
            numbers = numbers % self._tasks
        return seeding.fold(seeding.key(self._seeds[split], split), numbers)


class Tables(_Parts):
    """Classifications by a random part of a table: of its classes, its columns and its rows.

    A task is of one table of its split. It has some of its classes, put into `way` heaps at
    random, each heap a label: with more classes than ways a label is of several, and a line
    between labels is seldom straight. It sees some columns, the rest of its F features are zero.
    A label's rows are of its classes by turns. Every feature is scaled by mean and deviation of
    the support rows.

    No class is in two splits, so that no row is.

    Args:
        train, val, test: What each split has: names of tables, or `digits:0-5` for some of the
            classes of one, or `digits:0+3`.
        classes: Fewest and most classes of a task.
        **common: Those of `_Parts`: features, tasks, sizes, seeds, device and precision.

    Raises:
        ValueError: A table is unknown or too small, a class is in two splits, a number is out of
            range, or scikit-learn is missing.
    """

    def __init__(
        self,
        *,
        train: Sequence[str] = ("digits:0-6", "wine"),
        val: Sequence[str] = ("digits:7-9",),
        test: Sequence[str] = ("iris", "breast_cancer"),
        features: tuple[int, int] = (2, 8),
        classes: tuple[int, int] = (2, 6),
        **common: Any,
    ) -> None:
        super().__init__(features=features, **common)
        self._classes = check_pair("classes", classes, 2)
        named: dict[Split, Sequence[str]] = {"train": train, "val": val, "test": test}
        self._held = {split: self._load(split, named[split]) for split in SPLITS}
        _check_apart(self._held)
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
        """Draw tasks `index … index + num_tasks - 1` of a split.

        `class_ids` name the first class of each way, among those of the split's tables.
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
        support, support_y = _mixed(keys, _SLOT_SUPPORT, rows[:, :, : size.shot])
        query, query_y = _mixed(keys, _SLOT_QUERY, rows[:, :, size.shot :])
        support, query = scaled(support, query)
        return TaskBatch(
            support.to(self._dtype), support_y, query.to(self._dtype), query_y, class_ids=first
        )

    def class_names(self, split: Split) -> tuple[str, ...]:
        """The name behind each number in `class_ids`, as `iris/setosa`."""
        return tuple(f"{own.name}/{name}" for own in self._held[split] for name in own.classes)

    def fingerprint(self) -> str:
        """A hash of every split's rows and classes, and of how tasks are drawn."""
        digest = hashlib.sha256(repr((self._features, self._classes)).encode())
        for split in SPLITS:
            for own in self._held[split]:
                digest.update(repr((split, own.name, own.classes)).encode())
                digest.update(own.rows.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _draw(self, own: _Held, keys: Tensor, size: EpisodeSize) -> tuple[Tensor, Tensor]:
        """(T, W, R, F) rows of tasks of one table, and (T, W) the first class of each way."""
        most = min(self._classes[1], len(own.classes))
        fewest = max(self._classes[0], size.way)
        num_rows = size.shot + size.query
        chosen = seeding.choose(keys, _SLOT_CLASSES, len(own.classes), most)
        number = fewest + seeding.integers(keys, _SLOT_NUMBER, most - fewest + 1)
        place = torch.arange(most, device=self.device)
        # One class for each way, the others anywhere, and beyond the task's number nowhere.
        side = seeding.integers(keys, _SLOT_SIDES, size.way, (most,))
        side = torch.where(place < size.way, place, side)
        side = torch.where(place < number[:, None], side, size.way)
        way = torch.arange(size.way, device=self.device)
        of_way = side[:, None] == way[:, None]
        heap = of_way.sum(2, keepdim=True)
        turns = torch.arange(num_rows, device=self.device)
        # Of each way's rows: which class, and which of its rows, no row twice.
        order = (~of_way).to(torch.int8).argsort(dim=2, stable=True)
        classes = order.gather(2, turns % heap)
        per_class = seeding.fold(keys[:, None], chosen)
        rows = sample(per_class, _SLOT_ROWS, own.counts[chosen], num_rows)
        shuffle = seeding.bits(per_class, _SLOT_ORDER, (num_rows,)).argsort(dim=-1, stable=True)
        rows = rows.gather(-1, shuffle) + own.starts[chosen][..., None]
        times = turns // heap
        picked = rows.flatten(1).gather(1, (classes * num_rows + times).flatten(1))
        picked = picked.unflatten(1, (size.way, num_rows))
        shuffle = seeding.bits(keys, _SLOT_WAYS, (size.way, num_rows)).argsort(dim=-1, stable=True)
        picked = picked.gather(-1, shuffle)
        return some_columns(own.rows, picked, keys, self._features), chosen[:, : size.way]

    def _load(self, split: Split, named: Sequence[str]) -> list[_Held]:
        if not named:
            raise ValueError(f"data.{split}=[]: expected names of tables: {', '.join(CLASSIFIED)}")
        held = [self._one(split, word) for word in named]
        size = self.sizes[split]
        way_key = f"{_SIZE_KEYS[split]}way"
        if self._classes[1] < size.way:
            raise ValueError(
                f"{way_key}={size.way} is more than the {self._classes[1]} classes that a task "
                f"takes: set data.classes=[{size.way},{size.way}]"
            )
        for own in held:
            fewest = max(self._classes[0], size.way)
            if len(own.classes) < fewest:
                raise ValueError(
                    f"data.{split} has {len(own.classes)} classes of {own.name}, and a task takes "
                    f"{fewest} or more: set {way_key} or data.classes lower"
                )
            needed, count = size.shot + size.query, int(own.counts.min())
            if count < needed:
                name = own.classes[int(own.counts.argmin())]
                raise ValueError(
                    f"{name} of {own.name} has {count} rows, {size.shot}+{size.query} are needed: "
                    f"lower {_SIZE_KEYS[split]}shot or {_SIZE_KEYS[split]}query"
                )
        return held

    def _one(self, split: Split, word: str) -> _Held:
        """A table, or `name:classes`."""
        name, _, some = word.partition(":")
        if name not in CLASSIFIED:
            raise ValueError(
                f"data.{split}: there is no table {name}, expected {', '.join(CLASSIFIED)}"
            )
        rows, labels, names = table(name)
        try:
            wanted = _numbers(some) if some else list(range(len(names)))
            parts = [np.flatnonzero(labels == label) for label in wanted]
            chosen = tuple(names[label] for label in wanted)
        except (ValueError, IndexError):
            raise ValueError(
                f"data.{split}: {word} names no classes of {name}: expected {name}:FIRST-LAST or "
                f"{name}:A+B, numbers from 0 to {len(names) - 1}"
            ) from None
        counts = torch.tensor([len(part) for part in parts])
        return _Held(
            name,
            torch.from_numpy(rows[np.concatenate(parts)]).to(self.device),
            chosen,
            (counts.cumsum(0) - counts).to(self.device),
            counts.to(self.device),
        )


class Diabetes(_Parts):
    """Regressions of a disease's progress by a random part of the columns and the patients.

    The 442 patients are divided, 60 % for training and 20 % each for val and test, always the
    same. Targets are scaled by mean and deviation of the training patients', features by those of
    the support rows.

    Args:
        **common: Those of `_Parts`: features (of ten columns), tasks, sizes, seeds, device and
            precision.

    Raises:
        ValueError: A number is out of range, or scikit-learn is missing.
    """

    def __init__(self, *, features: tuple[int, int] = (2, 10), **common: Any) -> None:
        super().__init__(features=features, **common)
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
        """Draw tasks `index … index + num_tasks - 1` of a split."""
        keys = self._keys(split, index, num_tasks)
        size = self.sizes[split]
        rows = self._rows[split]
        counts = torch.full_like(keys, len(rows))
        picked = sample(keys, _SLOT_ROWS, counts, size.shot + size.query)
        shuffle = seeding.bits(keys, _SLOT_ORDER, picked.shape[1:]).argsort(dim=-1, stable=True)
        picked = picked.gather(1, shuffle)
        x = some_columns(rows, picked, keys, self._features)
        y = self._targets[split][picked][..., None].to(self._dtype)
        support, query = scaled(x[:, : size.shot], x[:, size.shot :])
        return TaskBatch(
            support.to(self._dtype), y[:, : size.shot], query.to(self._dtype), y[:, size.shot :]
        )

    def fingerprint(self) -> str:
        """A hash of every split's rows, and of how tasks are drawn."""
        digest = hashlib.sha256(repr(self._features).encode())
        for split in SPLITS:
            for part in (self._rows[split], self._targets[split]):
                digest.update(part.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


@lru_cache
def table(name: str) -> tuple[Any, Any, tuple[str, ...]]:
    """Rows (N, columns), labels or values (N,) and names of the classes of a table.

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
    """Each task's columns alone, (T, …, F), of the rows that it picked.

    Args:
        rows: (N, columns).
        picked: (T, …) numbers of rows.
        keys: (T,).
        bounds: Fewest and most columns of a task; F is the most.
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
    """Features (T, R, F) by mean and deviation of the support; zero if constant there."""
    mean = support.mean(1, keepdim=True)
    deviation = (support - mean).square().mean(1, keepdim=True).sqrt()
    unit = torch.where(deviation > 1e-9, deviation, 1.0)
    varies = deviation > 1e-9
    return (support - mean) / unit, torch.where(varies, (query - mean) / unit, 0.0)


def _mixed(keys: Tensor, slot: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (T, W, R, F) in random order: (T, W R, F), and their labels (T, W R)."""
    _, ways, num, width = rows.shape
    order = seeding.bits(keys, slot, (ways * num,)).argsort(dim=-1, stable=True)
    flat = rows.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, width))
    return flat, order // max(num, 1)


def _numbers(words: str) -> list[int]:
    """`0-5` or `0+3` as numbers, each once."""
    found: list[int] = []
    for word in words.split("+"):
        first, dash, last = word.partition("-")
        found += range(int(first), int(last if dash else first) + 1)
    if not found or len(set(found)) < len(found):
        raise ValueError(words)
    return found


def check_pair(name: str, value: tuple[int, int], least: int) -> tuple[int, int]:
    if not least <= value[0] <= value[1]:
        raise ValueError(
            f"data.{name}=[{value[0]},{value[1]}]: expected the fewest, {least} or more, and the "
            "most"
        )
    return value


def _check_apart(held: Mapping[Split, Sequence[_Held]]) -> None:
    """Refuse a class in two splits, or twice in one."""
    places = [
        (split, f"{own.name}/{n}") for split in SPLITS for own in held[split] for n in own.classes
    ]
    for (one, name), (other, same) in combinations(places, 2):
        if name == same:
            raise ValueError(
                f"{name} is in data.{one} and in data.{other}: what is learned there would be "
                "known here; name its classes, as digits:0-5, or other tables"
                if one != other
                else f"{name} is in data.{one} twice"
            )
