"""Classification episodes from rows that are kept on the device, sorted by class.

`ClassRows` draws the episodes; `ClassEpisodes` is that of images. A batch of episodes is one index
computation, one gather and one augmentation for all tasks.

Shapes: T tasks, W ways, K shots, S support rows, Q query rows, R rows, C H W images, N images, F
features.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from metarun.core import seeding
from metarun.core.checks import at_least
from metarun.core.types import (
    SPLITS,
    EpisodeSize,
    SourceSetup,
    Split,
    TaskBatch,
    TaskSpec,
    VaryingSize,
)
from metarun.data import meta_dataset
from metarun.data.augmentation import NO_AUGMENTATION, Augmentation
from metarun.data.conversion import converted
from metarun.data.preparation import Convert, Preparation

Rotations = Literal["none", "classes", "mirrored", "per_task"]
EvalRotations = Literal["none", "classes", "per_task"]
Episodes = Literal["any", "within_alphabet", "within_turned_alphabet"]
Classes = Literal["split", "all"]
Drawers = Literal["any", "apart"]

_LOG = logging.getLogger(__name__)
_NUM_ROTATIONS = 4
_CLASSES_OF_ONE = {"none": 1, "classes": 4, "mirrored": 8, "per_task": 1}
"""Number of classes that each class becomes under each value of `rotations`."""
_SLOT_GROUP, _SLOT_CLASSES, _SLOT_CLASS_ORDER, _SLOT_ROTATIONS = range(4)
_SLOT_IMAGES, _SLOT_ROW_ORDER, _SLOT_IMAGE_ORDER = 4, 5, 14
_SLOT_WEIGHTS = 15
_KEY_SUPPORT, _KEY_QUERY = 100, 101


@dataclass(frozen=True, slots=True)
class ClassTable:
    """Images, or rows of features, of one split.

    Attributes:
        images: (N, C, H, W) uint8 images, or (N, F) numbers, sorted by class.
        names: Name of each class.
        counts: Number of images of each class.
        groups: Group (alphabet) of each class; the classes of a group are adjacent.
        digest: Hash of the images, if it is already known.
    """

    images: Tensor
    names: tuple[str, ...]
    counts: tuple[int, ...]
    groups: tuple[str, ...] | None = None
    digest: str | None = None

    def __post_init__(self) -> None:
        assert self.images.dim() == (4 if self.images.dtype == torch.uint8 else 2)
        assert len(self.names) == len(self.counts)
        assert sum(self.counts) == len(self.images)

    def converted(self, channels: int, side: int) -> ClassTable:
        """Return the table with images of another size or number of channels."""
        if tuple(self.images.shape[1:]) == (channels, side, side):
            return self
        images = converted(self.images, channels, side)
        digest = None if self.digest is None else f"{self.digest} as {channels} x {side}"
        return replace(self, images=images, digest=digest)

    def fingerprint(self) -> str:
        """Return a hash of the names, the counts and the images."""
        digest = self.digest
        if digest is None:
            digest = hashlib.sha256(self.images.contiguous().numpy().data).hexdigest()
        facts = repr((self.names, self.counts, self.groups, tuple(self.images.shape), digest))
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class _Resident:
    """Images of a split on the device, and the positions of its classes and groups.

    Attributes:
        images: (N, C, H, W) uint8 images; (4 N, C, H, W) with rotated copies appended; or (8 N,
            C, H, W) with the mirrored and rotated copies appended to those.
        num_images: Number of images N without copies.
        starts, counts: (classes,) index of the first image and number of images of each class.
        group_starts, group_counts: (groups,) index of the first class and number of classes.
        rotation_classes: Number of copies that count as separate classes: 1, 4 or 8.
    """

    images: Tensor
    num_images: int
    starts: Tensor
    counts: Tensor
    group_starts: Tensor
    group_counts: Tensor
    rotation_classes: int


@dataclass(frozen=True, slots=True)
class _Composition:
    """Classes and sizes of the tasks of a step, as Meta-Dataset's rule draws them.

    Attributes:
        size: Way and query; `shot` is the size of the support set.
        classes, turns: (T, W), see `_choose_classes`.
        shots: (T, W) support rows of each class, on the CPU.
    """

    size: EpisodeSize
    classes: Tensor
    turns: Tensor
    shots: Tensor


class ClassRows(ABC):
    """Episodes as a pure function of (seed, split, index), from a table of classes per split.

    A subclass says how stored rows become inputs, in `prepared`.

    Args:
        setup: Sizes, seeds, device and precision. The way of val is lowered to its number of
            classes, unless `val_way` is set.
        name: Name of the data set, for messages.
        tables: Rows of each split.
        can_drop: Whether the data set has the option `min_per_class`.
    """

    least_way: ClassVar[int] = 2
    """Smallest number of classes of a task."""
    sizes_may_vary: ClassVar[bool] = True
    """Whether tasks may differ in size, see `SourceSetup.varying`."""
    noun: ClassVar[str] = "images"
    """What the rows are, for messages."""
    _where = ""
    """What the classes of a task have in common, for messages."""

    def __init__(
        self,
        setup: SourceSetup,
        *,
        name: str,
        tables: Mapping[Split, ClassTable],
        can_drop: bool = False,
    ) -> None:
        self._name = name
        self._tables = dict(tables)
        self._can_drop = can_drop
        self._seeds = setup.seeds
        self._dtype = setup.dtype
        self._resident: dict[Split, _Resident] = {}
        self.device = setup.device
        self.sizes = dict(setup.sizes)
        self._varying = dict(setup.varying)
        self._tasks_per_size: dict[Split, int] = {
            **dict.fromkeys(SPLITS, 1),
            "train": setup.tasks_per_step,
        }
        self._last_composition: tuple[Any, _Composition] | None = None
        # Evaluation first, because users set its keys.
        for split in ("test", "train"):
            self._check_size(split)
        self._fit_val_way(setup.val_way)
        self._check_size("val")
        varying = self._varying.values()
        self.spec = TaskSpec(
            kind="classification",
            input_shape=tuple(self._tables["train"].images.shape[1:]),
            output_dim=self.sizes["test"].way,
            train_way=self.sizes["train"].way,
            num_train_classes=self.num_classes("train"),
            train_shot=None if "train" in self._varying else self.sizes["train"].shot,
            ways_vary=any(own.rule or own.way.varies for own in varying),
            shots_differ=any(own.rule for own in varying),
        )

    def batch(self, split: Split, index: int, num_tasks: int) -> TaskBatch:
        """Return tasks `index … index + num_tasks - 1` of a split."""
        if split not in self._varying:
            return self._equal_tasks(split, index, num_tasks, self.sizes[split])
        together, end = self._tasks_per_size[split], index + num_tasks
        starts = [index, *range((index // together + 1) * together, end, together)]
        parts = zip(starts, [*starts[1:], end], strict=True)
        return TaskBatch.joined(
            [self._of_one_size(split, first, to - first) for first, to in parts]
        )

    def layout(self, split: Split, index: int) -> Hashable:
        """Return the size of a task if sizes vary; see `HasLayouts`."""
        if split not in self._varying:
            return None
        step = index // self._tasks_per_size[split]
        by_rule = self._varying[split].rule is not None
        return self._composition(split, step).size if by_rule else self._drawn_size(split, step)

    def _of_one_size(self, split: Split, index: int, num_tasks: int) -> TaskBatch:
        """Return tasks of one step, or one task of a test, whose size is drawn."""
        together = self._tasks_per_size[split]
        step, place = divmod(index, together)
        if self._varying[split].rule is None:
            return self._equal_tasks(split, index, num_tasks, self._drawn_size(split, step))
        whole = self._composition(split, step)
        return self._unequal_tasks(split, index, whole, slice(place, place + num_tasks))

    def _drawn_size(self, split: Split, step: int) -> EpisodeSize:
        """Draw a size from the ranges."""
        own, seed = self._varying[split], self._seeds[split]
        drawn = {
            name: numbers.low
            + seeding.key(seed, split, name, step) % (numbers.high - numbers.low + 1)
            for name, numbers in (("way", own.way), ("shot", own.shot), ("query", own.query))
        }
        return EpisodeSize(**drawn)

    def _composition(self, split: Split, step: int) -> _Composition:
        """Draw classes and sizes of the tasks of a step by Meta-Dataset's rule.

        The step draws a group of classes, the way and the share of the rows, each task its classes
        and their weights.
        """
        if self._last_composition is not None and self._last_composition[0] == (split, step):
            return self._last_composition[1]
        seed, together = self._seeds[split], self._tasks_per_size[split]
        groups = self._groups(split, meta_dataset.LEAST_WAY)
        first, number = groups[seeding.key(seed, split, "group", step) % len(groups)]
        most = min(meta_dataset.MOST_WAY, number * self._copies_in_task(split))
        ways = most - meta_dataset.LEAST_WAY + 1
        way = meta_dataset.LEAST_WAY + seeding.key(seed, split, "way", step) % ways
        beta = seeding.key(seed, split, "beta", step) % 2**53 * 2.0**-53
        data = self._in_groups(self._on_device(split), [(first, number)])
        keys = seeding.task_keys(seed, split, step * together, together, self.device)
        classes, turns = self._choose_classes(split, data, keys, way)
        counts = data.counts[classes].cpu()
        low, high = meta_dataset.LOG_WEIGHTS
        weights = seeding.uniform(
            keys.cpu(), _SLOT_WEIGHTS, (way,), low=low, high=high, dtype=torch.float64
        ).exp()
        query = meta_dataset.query_size(counts)
        size = meta_dataset.support_size(counts, query, beta)
        shots = meta_dataset.shots(counts, query, size, weights)
        found = EpisodeSize(way, int(shots[0].sum()), query)
        composition = _Composition(found, classes, turns, shots)
        self._last_composition = (split, step), composition
        return composition

    def _equal_tasks(
        self, split: Split, index: int, num_tasks: int, size: EpisodeSize
    ) -> TaskBatch:
        """Return tasks with the same number of rows of each class."""
        data = self._for_way(split, size.way)
        keys = seeding.task_keys(self._seeds[split], split, index, num_tasks, self.device)
        picks, class_ids = self._pick(split, data, keys, size)
        support = self._rows(split, data, keys, picks[..., : size.shot], _KEY_SUPPORT)
        query = self._rows(split, data, keys, picks[..., size.shot :], _KEY_QUERY)
        return TaskBatch(*support, *query, class_ids)

    def _unequal_tasks(
        self, split: Split, index: int, whole: _Composition, tasks: slice
    ) -> TaskBatch:
        """Return those tasks of a step whose classes have different numbers of support rows."""
        size, shots = whole.size, whole.shots[tasks]
        data, num_tasks = self._on_device(split), len(shots)
        keys = seeding.task_keys(self._seeds[split], split, index, num_tasks, self.device)
        classes, turns = whole.classes[tasks], whole.turns[tasks]
        own = shots.to(self.device)
        # Of the whole step, so that a task is the same in any part of it.
        most = int(whole.shots.max())
        picks = self._choose_unequal(data, keys, classes, own + size.query, most + size.query)
        picks, class_ids = self._placed(split, data, keys, picks, classes, turns)
        there = torch.arange(most, device=self.device) < own[..., None]
        query, support = picks[..., : size.query], picks[..., size.query :]
        return TaskBatch(
            *self._rows(split, data, keys, support, _KEY_SUPPORT, there, size.shot),
            *self._rows(split, data, keys, query, _KEY_QUERY),
            class_ids,
        )

    @abstractmethod
    def prepared(self, rows: Tensor) -> Tensor:
        """Return stored rows (…, *row_shape) as inputs (…, *input_shape), without augmentation."""

    def all_rows(self, split: Split, at_once: int = 250) -> Iterator[Tensor]:
        """Yield the inputs (n, *input_shape) of a split, by the classes that `class_ids` numbers.

        Args:
            split: The split.
            at_once: Largest number of rows n.
        """
        data = self._on_device(split)
        for part in data.images[: data.num_images * self._copies(split)].split(at_once):
            yield self.prepared(part)

    def counts(self, split: Split) -> tuple[int, ...]:
        """Return the number of rows of each class that `class_ids` numbers."""
        return self._tables[split].counts * self._copies(split)

    def num_classes(self, split: Split) -> int:
        """Return the number of classes that `class_ids` numbers, with rotations as classes."""
        return self._copies(split) * len(self._tables[split].counts)

    def class_names(self, split: Split) -> tuple[str, ...]:
        """Return the names of the classes that `class_ids` numbers."""
        return self._tables[split].names

    def fingerprint(self) -> str:
        """Return a hash of every split's classes and rows."""
        facts = [f"{split}:{table.fingerprint()}" for split, table in self._tables.items()]
        return hashlib.sha256(";".join(facts).encode()).hexdigest()[:16]

    def _choose_classes(
        self, split: Split, data: _Resident, keys: Tensor, way: int
    ) -> tuple[Tensor, Tensor]:
        """Draw (T, W) distinct classes of one group, in random order, and their copies."""
        group = seeding.integers(keys, _SLOT_GROUP, len(data.group_starts))
        count = data.group_counts[group]
        copies = self._copies_in_task(split)
        chosen = sample(keys, _SLOT_CLASSES, count * copies, way)
        order = seeding.bits(keys, _SLOT_CLASS_ORDER, (way,)).argsort(dim=-1, stable=True)
        chosen = chosen.gather(-1, order)
        turns = chosen // count[:, None]
        return data.group_starts[group][:, None] + chosen % count[:, None], turns

    def _pick(
        self, split: Split, data: _Resident, keys: Tensor, size: EpisodeSize
    ) -> tuple[Tensor, Tensor]:
        """Draw the (T, W, K + Q) indices in `data.images` of each task, and its (T, W) classes."""
        classes, turns = self._choose_classes(split, data, keys, size.way)
        picks = self._choose_images(data, keys, classes, size.shot + size.query)
        return self._placed(split, data, keys, picks, classes, turns)

    def _placed(
        self,
        split: Split,  # noqa: ARG002
        data: _Resident,
        keys: Tensor,  # noqa: ARG002
        picks: Tensor,
        classes: Tensor,
        turns: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the indices in `data.images` of images numbered within their class."""
        class_ids = classes + turns * len(data.counts)
        return picks + (data.starts[classes] + turns * data.num_images)[..., None], class_ids

    def _choose_images(
        self, data: _Resident, keys: Tensor, classes: Tensor, num_rows: int
    ) -> Tensor:
        """Draw (T, W, num_rows) distinct images of each class, numbered within the class."""
        keys = seeding.fold(keys[:, None], self._owners(classes.shape[1]))
        picks = sample(keys, _SLOT_IMAGES, data.counts[classes], num_rows)
        # The last samples tend to have high numbers: shuffle before splitting off the query.
        order = seeding.bits(keys, _SLOT_IMAGE_ORDER, (num_rows,)).argsort(dim=-1, stable=True)
        return picks.gather(-1, order)

    def _choose_unequal(
        self, data: _Resident, keys: Tensor, classes: Tensor, numbers: Tensor, most: int
    ) -> Tensor:
        """Draw (T, W) `numbers` of distinct images: (T, W, most), those beyond them undefined."""
        keys = seeding.fold(keys[:, None], self._owners(classes.shape[1]))
        picks = sample(keys, _SLOT_IMAGES, data.counts[classes], most, numbers)
        order = seeding.bits(keys, _SLOT_IMAGE_ORDER, (most,))
        order = _last(order, torch.arange(most, device=self.device) >= numbers[..., None])
        return picks.gather(-1, order.argsort(dim=-1, stable=True))

    def _owners(self, way: int) -> Tensor:
        """Return (W,) numbers; classes of a task with equal ones draw images of equal numbers."""
        return torch.arange(way, device=self.device)

    def _rows(
        self,
        split: Split,
        data: _Resident,
        keys: Tensor,
        picks: Tensor,
        purpose: int,
        there: Tensor | None = None,
        total: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (T, R, *input_shape) inputs and (T, R) labels of picks, in random order.

        Args:
            split, data, keys: Those of the tasks.
            picks: (T, W, K) indices in `data.images`.
            purpose: Number that separates the draws for support and query.
            there: (T, W, K), which of the picks are rows; None takes all.
            total: Number of rows R, if not all are.
        """
        _, way, num = picks.shape
        keys = seeding.fold(keys, torch.tensor(purpose, device=self.device))
        order = seeding.bits(keys, _SLOT_ROW_ORDER, (way * num,))
        if there is not None:
            order = _last(order, ~there.flatten(1))
        order = order.argsort(dim=-1, stable=True)[:, :total]
        labels = order // max(num, 1)
        index = picks.flatten(1).gather(-1, order)
        return self._inputs(split, data, keys, index), labels

    def _inputs(self, split: Split, data: _Resident, keys: Tensor, index: Tensor) -> Tensor:  # noqa: ARG002
        """Return the inputs (T, R, *input_shape) of an index (T, R)."""
        rows = data.images.index_select(0, index.flatten()).unflatten(0, index.shape)
        return self.prepared(rows)

    def _on_device(self, split: Split) -> _Resident:
        """Return the split as device tensors, which are created at the first call."""
        if split not in self._resident:
            self._resident[split] = self._move(split)
        return self._resident[split]

    def _for_way(self, split: Split, way: int) -> _Resident:
        """Return the split with those groups that have enough classes."""
        data = self._on_device(split)
        if split not in self._varying:
            return data
        return self._in_groups(data, self._groups(split, way))

    def _in_groups(self, data: _Resident, groups: Sequence[tuple[int, int]]) -> _Resident:
        """Return a split with other groups, each a first class and a number of classes."""
        first, number = (torch.tensor(own, device=self.device) for own in zip(*groups, strict=True))
        return replace(data, group_starts=first, group_counts=number)

    def _move(self, split: Split) -> _Resident:
        table = self._tables[split]
        counts = torch.tensor(table.counts)
        starts = counts.cumsum(0) - counts
        groups = self._groups(split, self.sizes[split].way)
        first, number = zip(*groups, strict=True)
        return _Resident(
            images=self._with_copies(split, table.images.to(self.device)),
            num_images=len(table.images),
            starts=starts.to(self.device),
            counts=counts.to(self.device),
            group_starts=torch.tensor(first, device=self.device),
            group_counts=torch.tensor(number, device=self.device),
            rotation_classes=self._copies(split),
        )

    def _with_copies(self, split: Split, images: Tensor) -> Tensor:  # noqa: ARG002
        """Return the stored rows of a split with their copies appended."""
        return images

    def _groups(self, split: Split, way: int) -> list[tuple[int, int]]:  # noqa: ARG002
        """Return (first class, number of classes) of each group with enough classes."""
        return [(0, len(self._tables[split].counts))]

    def _copies(self, split: Split) -> int:  # noqa: ARG002
        """Return the number of classes that each class of the table becomes by rotations."""
        return 1

    def _copies_in_task(self, split: Split) -> int:
        """Return the number of rotations of one class that a task can have."""
        return self._copies(split)

    def _most_classes(self, split: Split) -> int:
        """Return the largest number of classes that a task can have."""
        copies = self._copies_in_task(split)
        return copies * max(count for _, count in self._groups(split, 0))

    def _fit_val_way(self, typed: int | None) -> None:
        """Lower the way of val to its number of classes, unless the user set it."""
        size, most = self.sizes["val"], self._most_classes("val")
        varying = self._varying.get("val")
        if typed is not None or size.way <= most or (varying is not None and varying.rule):
            return
        if varying is not None:
            varying = replace(varying, way=varying.way.clipped(most))
            self._varying["val"], self.sizes["val"] = varying, varying.largest
            _LOG.warning("val has %d classes: meta-val runs with way %s", most, varying.way)
            return
        _LOG.warning(
            "val has %d classes, fewer than way=%d: meta-val runs with way %d "
            "(eval.val_way sets it)",
            most,
            size.way,
            most,
        )
        self.sizes["val"] = EpisodeSize(way=most, shot=size.shot, query=size.query)

    def _check_size(self, split: Split) -> None:
        """Check that the split has enough classes and images for a task."""
        size, table = self.sizes[split], self._tables[split]
        keys = _SIZE_KEYS[split]
        varying = self._varying.get(split)
        if varying is not None and varying.rule is not None:
            self._check_rule(split, varying)
            return
        smallest = size if varying is None else varying.smallest
        least = {"way": self.least_way, "shot": 1, "query": 0 if split == "train" else 1}
        for field, low in least.items():
            at_least("", low, **{keys[field]: getattr(smallest, field)})
        most = self._most_classes(split)
        if size.way > most:
            typed = size.way if varying is None else varying.way
            raise ValueError(
                f"{keys['way']}={typed} is more than the {most} classes in {self._where}"
                f"{self._name}'s {split} split: set {keys['way']}={most} or less"
            )
        fewest = min(range(len(table.counts)), key=table.counts.__getitem__)
        needed, count = size.shot + size.query, table.counts[fewest]
        if count < needed:
            raise ValueError(
                f"class {table.names[fewest]} has {count} {self.noun}, {size.shot}+{size.query} "
                f"are needed: {self._way_out(split, size, count)}"
            )

    def _check_rule(self, split: Split, varying: VaryingSize) -> None:
        """Check that Meta-Dataset's rule applies to a split, and set its largest size."""
        key = "train.sizes" if split == "train" else "sizes"
        rule, table = f"{key}={varying.rule}", self._tables[split]
        most = self._most_classes(split)
        if most < meta_dataset.LEAST_WAY:
            raise ValueError(
                f"{rule} needs {meta_dataset.LEAST_WAY} classes or more, but there are {most} in "
                f"{self._where}{self._name}'s {split} split: use way and shot"
            )
        for name, count in zip(table.names, table.counts, strict=True):
            if count < 2:
                raise ValueError(
                    f"{rule} needs 2 {self.noun} of each class or more, but class {name} has "
                    f"{count}: leave it out"
                )
        way = min(meta_dataset.MOST_WAY, most)
        query = min(meta_dataset.MOST_QUERY, max(table.counts) // 2)
        self.sizes[split] = EpisodeSize(way, -(-meta_dataset.MOST_SUPPORT // way), query)

    def _way_out(self, split: Split, size: EpisodeSize, count: int) -> str:
        """Return the advice for a class with too few images."""
        keys = _SIZE_KEYS[split]
        if count > size.shot:
            lower = f"lower {keys['query']} to {count - size.shot}"
        else:
            lower = f"lower {keys['shot']} to {max(count - 1, 1)} and {keys['query']} to 1"
        drop = f" or set data.min_per_class={size.shot + size.query} to drop it"
        return lower + (drop if self._can_drop else "")


class PreparesImages(ABC):
    """A data set of images, which prepares a user's images as its own.

    Attributes:
        spec: Kind and shapes of the tasks.
        preparation: How an image becomes a row.
    """

    spec: TaskSpec
    preparation: Preparation

    def prepare(self, images: Any) -> Tensor:
        """Convert a user's images to rows (N, C, H, W), as the images of this data set were.

        Args:
            images: List of paths, PIL images or arrays ((H, W), (H, W, C) or (C, H, W), uint8
                or in [0, 1]), or one array with a leading dimension. A floating-point torch
                tensor (N, C, H, W) of the data set's input shape counts as already prepared.

        Raises:
            ValueError: An image cannot be read; the message names it.
        """
        return self.preparation.rows(images, self.spec.input_shape)

    @abstractmethod
    def as_for(self, shape: tuple[int, ...], preparation: Preparation) -> PreparesImages:
        """Return these episodes for a learner of other images.

        Args:
            shape: (C, H, W) of the learner's inputs; images are resized and change channels.
            preparation: How the learner's images became rows: their normalization holds here, too.
        """


class ClassEpisodes(ClassRows, PreparesImages):
    """Episodes of images.

    Args:
        setup, name, tables, can_drop: See `ClassRows`.
        rotations: Rotations in training. `none`; `classes` makes each rotation by a multiple of
            90 degrees a class; `mirrored` also adds the mirror images of these; `per_task`
            rotates each class of a task by one random multiple of 90 degrees.
        rotations_eval: The same for val and test, without `mirrored`.
        rotations_val: The same for val only, so that model selection has more classes; None
            takes `rotations_eval`.
        classes: `split`, or `all`: every split has the classes of all tables.
        episodes: `any`; `within_alphabet` takes a task's classes from one group and its rotations;
            `within_turned_alphabet` takes one rotation for all classes of such a task. None is
            `within_alphabet` where Meta-Dataset's rule draws the sizes and there are groups, as in
            the paper, and `any` elsewhere.
        drawers: `any` draws the images of each class by themselves. `apart` draws one person for
            each shot and each query, the same for all classes of a task; no person draws both
            support and query. Image k of every class of a group has to be by the same person.
        augmentation: Augmentation of training images.
        mean, std: Mean and standard deviation of each channel, in [0, 1] units; None leaves
            pixels in [0, 1].
        prepare: Function that converts one PIL image to (C, H, W) uint8, as for the tables. A
            `Photograph` or `Drawing` lets a run be used without its data.
    """

    def __init__(
        self,
        setup: SourceSetup,
        *,
        name: str,
        tables: Mapping[Split, ClassTable],
        rotations: Rotations = "none",
        rotations_eval: EvalRotations = "none",
        rotations_val: EvalRotations | None = None,
        classes: Classes = "split",
        episodes: Episodes | None = None,
        drawers: Drawers = "any",
        augmentation: Augmentation = NO_AUGMENTATION,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        prepare: Convert,
        can_drop: bool = False,
    ) -> None:
        if classes == "all":
            whole = _joined(tables)
            tables = dict.fromkeys(tables, whole)
            self.notes_for_user: tuple[str, ...] = (all_in_each(whole.names),)
        ruled = any(own.rule for own in setup.varying.values())
        if episodes is None:
            grouped = tables["train"].groups is not None
            episodes = "within_alphabet" if ruled and grouped else "any"
        if drawers == "apart" and episodes == "any":
            raise ValueError(
                "data.drawers=apart needs classes of one alphabet, which the same people drew: "
                "use data.episodes=within_alphabet"
            )
        if drawers == "apart" and ruled:
            raise ValueError(
                "sizes=meta_dataset gives classes unequal shots, data.drawers=apart the same "
                "people for all: use data.drawers=any"
            )
        if drawers == "apart":
            assert all(len(set(table.counts)) == 1 for table in tables.values())
        if episodes == "within_turned_alphabet" and "per_task" in (
            rotations,
            rotations_eval,
            rotations_val,
        ):
            raise ValueError(
                "data.episodes=within_turned_alphabet turns all classes of a task alike, "
                "rotations=per_task each by itself: use rotations=classes or mirrored"
            )
        self._rotations: dict[Split, Rotations] = {
            "train": rotations,
            "val": rotations_eval if rotations_val is None else rotations_val,
            "test": rotations_eval,
        }
        self._episodes = episodes
        self._where = "" if episodes == "any" else "an alphabet of "
        self._turned_as_one = episodes == "within_turned_alphabet"
        self._drawers_apart = drawers == "apart"
        self._augmentation = augmentation
        channels = tables["train"].images.shape[1]
        assert mean is None or len(mean) == channels
        self.preparation = Preparation(prepare, mean, std, setup.device, setup.dtype)
        super().__init__(setup, name=name, tables=tables, can_drop=can_drop)

    def as_for(self, shape: tuple[int, ...], preparation: Preparation) -> ClassEpisodes:
        """Return these episodes for a learner of other images; see `PreparesImages`."""
        channels, side = shape[0], shape[-1]
        tables = {id(table): table.converted(channels, side) for table in self._tables.values()}
        other = copy.copy(self)
        other._tables = {split: tables[id(table)] for split, table in self._tables.items()}
        other._resident = {}
        other.preparation = preparation
        other.spec = replace(self.spec, input_shape=shape)
        return other

    def class_names(self, split: Split) -> tuple[str, ...]:
        """Return the names of the classes that `class_ids` numbers."""
        names = self._tables[split].names
        copies = self._copies(split)
        if copies == 1:
            return names
        turned = [f"rot{90 * turn:03d}" for turn in range(_NUM_ROTATIONS)]
        shown = [*turned, *(f"mirror_{turn}" for turn in turned)][:copies]
        return tuple(f"{name}/{turn}" for turn in shown for name in names)

    def original_names(self, split: Split) -> tuple[str, ...]:
        """Return the names of the classes without their rotations."""
        return self._tables[split].names

    def prepared(self, rows: Tensor) -> Tensor:
        return self._normalize(self.preparation.shares(rows))

    def _choose_classes(
        self, split: Split, data: _Resident, keys: Tensor, way: int
    ) -> tuple[Tensor, Tensor]:
        classes, turns = super()._choose_classes(split, data, keys, way)
        if self._turned_as_one:
            turn = seeding.integers(keys, _SLOT_ROTATIONS, data.rotation_classes)
            turns = turn[:, None].expand_as(classes)
        return classes, turns

    def _placed(
        self,
        split: Split,
        data: _Resident,
        keys: Tensor,
        picks: Tensor,
        classes: Tensor,
        turns: Tensor,
    ) -> tuple[Tensor, Tensor]:
        picks, class_ids = super()._placed(split, data, keys, picks, classes, turns)
        if self._rotations[split] == "per_task":
            way = (classes.shape[1],)
            turns = seeding.integers(keys, _SLOT_ROTATIONS, _NUM_ROTATIONS, way)
            picks = picks + (turns * data.num_images)[..., None]
        return picks, class_ids

    def _owners(self, way: int) -> Tensor:
        places = super()._owners(way)
        # Classes with the same key get images of the same numbers, and thus the same people.
        return torch.zeros_like(places) if self._drawers_apart else places

    def _inputs(self, split: Split, data: _Resident, keys: Tensor, index: Tensor) -> Tensor:
        """Return the images (T, R, C, H, W) of an index (T, R), augmented in training tasks."""
        images = self.preparation.shares(data.images.index_select(0, index.flatten()))
        images = images.unflatten(0, index.shape)
        if split == "train" and index.shape[1]:
            images = self._augmentation(images, keys)
        return self._normalize(images)

    def _normalize(self, images: Tensor) -> Tensor:
        return self.preparation.normalize(images)

    def _with_copies(self, split: Split, images: Tensor) -> Tensor:
        rotations = self._rotations[split]
        if rotations == "none":
            return images
        sides = [images, images.flip(-1)] if rotations == "mirrored" else [images]
        turns = range(_NUM_ROTATIONS)
        turned = [side.rot90(turn, dims=(-2, -1)) for side in sides for turn in turns]
        return torch.cat(turned).contiguous()

    def _groups(self, split: Split, way: int) -> list[tuple[int, int]]:
        table = self._tables[split]
        if self._episodes == "any":
            return [(0, len(table.counts))]
        if table.groups is None:
            raise ValueError(
                f"data.episodes={self._episodes} needs alphabets, {self._name} has none: "
                "use data.episodes=any"
            )
        names = dict.fromkeys(table.groups)
        spans = [(table.groups.index(name), table.groups.count(name)) for name in names]
        return [span for span in spans if self._copies_in_task(split) * span[1] >= way]

    def _copies(self, split: Split) -> int:
        return _CLASSES_OF_ONE[self._rotations[split]]

    def _copies_in_task(self, split: Split) -> int:
        return 1 if self._turned_as_one else self._copies(split)


def all_in_each(names: Sequence[str]) -> str:
    """Return the note for `data.classes=all`."""
    return f"data.classes=all: training, validation and test have all {len(names)} classes"


def _joined(tables: Mapping[Split, ClassTable]) -> ClassTable:
    """Return one table of all classes; those of a group are adjacent."""
    parts = list(tables.values())
    names = [name for part in parts for name in part.names]
    counts = [count for part in parts for count in part.counts]
    groups = [group for part in parts for group in part.groups or ()]
    order = sorted(range(len(names)), key=groups.__getitem__) if groups else range(len(names))
    images = torch.cat([part.images for part in parts])
    if groups:
        of_class = images.split(counts)
        images = torch.cat([of_class[i] for i in order])
    return ClassTable(
        images=images,
        names=tuple(names[i] for i in order),
        counts=tuple(counts[i] for i in order),
        groups=tuple(groups[i] for i in order) or None,
    )


_SIZE_KEYS: dict[Split, dict[str, str]] = {
    "train": {"way": "train.way", "shot": "train.shot", "query": "train.query"},
    "val": {"way": "eval.val_way", "shot": "shot", "query": "query"},
    "test": {"way": "way", "shot": "shot", "query": "query"},
}


def _last(order: Tensor, absent: Tensor) -> Tensor:
    """Return random numbers with the largest one where something is absent, to sort it last."""
    return order.masked_fill(absent, torch.iinfo(order.dtype).max)


def sample(
    keys: Tensor, slot: int, counts: Tensor, num: int, numbers: Tensor | None = None
) -> Tensor:
    """Draw `num` distinct numbers below each of `counts`: (*K, num), not in uniform order.

    Uses Floyd's algorithm (Bentley & Floyd 1987), whose cost grows with `num` and not with
    `counts`. The counts may differ between keys. So may the number of draws: with `numbers` (*K),
    `num` or less, the draws after that many are undefined.
    """
    draws = (seeding.bits(keys, slot, (num,)) >> 1) & (2**62 - 1)
    chosen = torch.empty_like(draws)
    tops = counts - (num if numbers is None else numbers)
    for place in range(num):
        top = tops + place
        drawn = draws[..., place] % (top + 1)
        seen = (chosen[..., :place] == drawn[..., None]).any(dim=-1)
        chosen[..., place] = torch.where(seen, top, drawn)
    return chosen
