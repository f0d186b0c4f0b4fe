"""Streams of tasks with the same classes but different transformations of the images.

Shapes: T streams, J tasks in each, W classes, K rows of a class in a task, P images of a class
that the tasks share, Q held-out rows of a class, R = W K or W Q, C H W images.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarun.core import seeding
from metarun.core.checks import at_least
from metarun.core.types import SPLITS, SourceSetup, Split, Stream, TaskBatch
from metarun.data.augmentation import places_of, warp
from metarun.data.episodes import ClassEpisodes
from metarun.data.gray_images import Division, gray_images

_SLOT_ANGLE, _SLOT_PERMUTATION, _SLOT_LOOKS = 40, 41, 42
_SLOT_SHARED, _SLOT_ORDER = 43, 44
_COLORS = (
    (0.9, 0.1, 0.1), (0.9, 0.5, 0.0), (0.9, 0.9, 0.1), (0.1, 0.7, 0.1), (0.1, 0.7, 0.9),
    (0.1, 0.1, 0.9), (0.6, 0.1, 0.8),
)  # fmt: skip
_NUM_SCALES, _NUM_TURNS = 2, 4


class TransformedStream(ClassEpisodes):
    """Streams whose tasks have the same `way` classes and each its own image transformation.

    A task shows `shot` images of each class in random order. They are drawn from `pool` images
    that all tasks of the stream share. `query` further images of each class are held out and never
    shown. A class keeps its label in all tasks.

    Args:
        source: Data set of the images, in gray levels. `digits` are the 1,797 handwritten digits
            of scikit-learn (8x8, enlarged to 16x16), of which every split has images of all ten.
            Others are `omniglot_small` and every data set of images that is stored, such as
            `mnist`. The splits share either classes or nothing, see `split`, but never an image.
        tasks: Number of tasks J.
        pool: Number of shared images P of a class, limited to those that are not held out.
        rows: Number of rows that arrive together in one step.
        task_ids_known: Whether the learner is given the task of each row.
        image_size, root, split, val_fraction, test_fraction: See `gray_images`.

    Raises:
        ValueError: A number is out of range, an option is unknown, the images are not stored, or
            scikit-learn is missing.
    """

    found_in_files: ClassVar[tuple[str, ...]] = ("image_size",)
    sizes_may_vary = False
    channels: ClassVar[int] = 1
    """Number of channels of the transformed images."""
    most_tasks: ClassVar[int | None] = None
    """Number of different transformations; None if it is unlimited."""

    def __init__(
        self,
        setup: SourceSetup,
        *,
        source: str = "digits",
        tasks: int = 20,
        pool: int = 50,
        rows: int = 10,
        task_ids_known: bool = True,
        image_size: int | None = None,
        root: str | None = None,
        split: Division = "published",
        val_fraction: float = 0.2,
        test_fraction: float = 0.25,
    ) -> None:
        at_least("data", 1, tasks=tasks, pool=pool, rows=rows)
        if self.most_tasks is not None and tasks > self.most_tasks:
            raise ValueError(
                f"data.tasks={tasks}: expected {self.most_tasks} or fewer, one for each "
                "transformation"
            )
        images = gray_images(
            source,
            root=root,
            image_size=image_size,
            split=split,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
        )
        self.notes_for_user = images.notes
        self.resolved_options = {"image_size": images.tables["test"].images.shape[-1]}
        super().__init__(setup, name=source, tables=images.tables, prepare=images.prepare)
        self._tasks = tasks
        self._pools = {split: self._shared(split, pool) for split in SPLITS}
        layouts = {split: self._layout(split, rows, task_ids_known) for split in SPLITS}
        _, height, width = self.spec.input_shape
        self.spec = replace(
            self.spec,
            input_shape=(self.channels, height, width),
            output_dim=max(size.way for size in self.sizes.values()),
            num_train_classes=None,
            streams=layouts,
        )

    def batch(self, split: Split, index: int, num_tasks: int) -> TaskBatch:
        """Return streams `index … index + num_tasks - 1` of a split."""
        size, data = self.sizes[split], self._on_device(split)
        keys = seeding.task_keys(self._seeds[split], split, index, num_tasks, self.device)
        classes, _ = self._choose_classes(split, data, keys, size.way)
        pool = self._pools[split]
        picks = self._choose_images(data, keys, classes, pool + size.query)
        picks = picks + data.starts[classes][..., None]
        owners = seeding.fold(keys[:, None], torch.arange(self._tasks, device=self.device))
        # (T, J, W): each class of each task draws from the pool independently.
        own = seeding.fold(owners[..., None], torch.arange(size.way, device=self.device))
        shown = seeding.choose(own, _SLOT_SHARED, pool, size.shot)
        support = picks[:, None, :, :pool].expand(-1, self._tasks, -1, -1).gather(3, shown)
        held = picks[:, None, :, pool:].expand(-1, self._tasks, -1, -1)
        order = seeding.bits(owners, _SLOT_ORDER, (size.way * size.shot,))
        order = order.argsort(dim=-1, stable=True)
        rows = [support.flatten(2).gather(2, order), held.flatten(2)]
        labels = [order // size.shot, torch.arange(size.way, device=self.device)]
        labels[1] = labels[1].repeat_interleave(size.query).expand(num_tasks, self._tasks, -1)
        return TaskBatch(
            self._changed(split, data, keys, rows[0]),
            labels[0].flatten(1),
            self._changed(split, data, keys, rows[1]),
            labels[1].flatten(1),
            classes,
        )

    def fingerprint(self) -> str:
        """Return a hash of the images, of the kind of transformation and of the layout."""
        assert self.spec.streams is not None
        facts = (
            super().fingerprint(),
            type(self).__name__,
            self._pools["test"],
            self.spec.streams["test"],
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @abstractmethod
    def change(self, images: Tensor, keys: Tensor) -> Tensor:
        """Apply the transformation of each task to its images.

        Args:
            images: (T, J, R, 1, H, W) original images in [0, 1].
            keys: (T,) keys of the streams.

        Returns:
            (T, J, R, C, H, W) transformed images.
        """

    def _changed(self, split: Split, data: Any, keys: Tensor, index: Tensor) -> Tensor:
        """Return the transformed images (T, J R, C, H, W) of an index (T, J, R)."""
        images = self._inputs(split, data, keys, index.flatten(1))
        return self.change(images.unflatten(1, index.shape[1:]), keys).flatten(1, 2)

    def _shared(self, split: Split, pool: int) -> int:
        """Return the number of images of a class that the tasks of a stream share."""
        size, fewest = self.sizes[split], min(self._tables[split].counts)
        shared = min(pool, fewest - size.query)
        if size.shot > shared:
            prefix = "train." if split == "train" else ""
            raise ValueError(
                f"{prefix}shot={size.shot} is more than the {shared} images of a class that the "
                f"tasks share in {self._name}'s {split} split: lower it, or {prefix}query, or "
                "raise data.pool"
            )
        return shared

    def _layout(self, split: Split, rows: int, task_ids_known: bool) -> Stream:
        size = self.sizes[split]
        visit = size.way * size.shot
        if visit % rows:
            raise ValueError(f"data.rows={rows} does not divide the {visit} rows of a task")
        visits = tuple(range(self._tasks))
        return Stream(visits, visit // rows, rows, size.way * size.query, task_ids_known)


class RotatedStream(TransformedStream):
    """Streams in which each task rotates its images by one angle, larger from task to task.

    As in MNIST rotations of Lopez-Paz & Ranzato (2017): the angle of task j is uniform on the
    j-th of J equal parts of [0, 180) degrees.
    """

    def change(self, images: Tensor, keys: Tensor) -> Tensor:
        """Rotate the images of each task."""
        part = seeding.uniform(keys, _SLOT_ANGLE, (self._tasks,), dtype=torch.float64)
        task = torch.arange(self._tasks, device=self.device)
        angle = math.pi * (task + part) / self._tasks
        return _moved(images, angle, torch.ones_like(angle))


class PermutedStream(TransformedStream):
    """Streams in which each task permutes the pixels of its images (Goodfellow et al. 2014)."""

    def change(self, images: Tensor, keys: Tensor) -> Tensor:
        """Permute the pixels of each task's images by the permutation of the task."""
        owners = seeding.fold(keys[:, None], torch.arange(self._tasks, device=self.device))
        pixels = images.shape[-2] * images.shape[-1]
        order = seeding.choose(owners, _SLOT_PERMUTATION, pixels, pixels)
        flat = images.flatten(-2)
        index = order[:, :, None, None].expand_as(flat)
        shuffled: Tensor = flat.gather(-1, index).unflatten(-1, images.shape[-2:])
        return shuffled


class RainbowStream(TransformedStream):
    """Streams of Rainbow MNIST's 56 transformations (Finn et al. 2019, section 5.2).

    They combine 7 background colors, 2 scales and 4 rotations by multiples of 90 degrees, and
    come in random order.
    """

    channels = 3
    most_tasks = len(_COLORS) * _NUM_SCALES * _NUM_TURNS

    def change(self, images: Tensor, keys: Tensor) -> Tensor:
        """Rotate and scale the images of each task and color their background."""
        assert self.most_tasks is not None
        look = seeding.choose(keys, _SLOT_LOOKS, self.most_tasks, self._tasks)
        turn, rest = look % _NUM_TURNS, look // _NUM_TURNS
        scale, color = rest % _NUM_SCALES, rest // _NUM_SCALES
        angle = turn.to(torch.float64) * (math.pi / 2)
        ink = _moved(images, angle, 1.0 + scale.to(torch.float64))
        paper = torch.tensor(_COLORS, dtype=images.dtype, device=self.device)[color]
        paper = paper[:, :, None, :, None, None]
        return ink + (1.0 - ink) * paper


def _moved(images: Tensor, angle: Tensor, zoom: Tensor) -> Tensor:
    """Rotate (T, J, R, C, H, W) images by (T, J) angles in radians and shrink them by `zoom`."""
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    zero = torch.zeros_like(cos)
    maps = torch.stack([torch.stack([cos, -sin, zero]), torch.stack([sin, cos, zero])])
    grid = places_of(maps.flatten(2).to(images.dtype), images)
    rows = images.flatten(0, 1)
    grid = grid[:, :, None].expand(-1, -1, rows.shape[1], -1, -1).flatten(1, 2)
    return warp(rows.flatten(0, 1), grid, "zeros").reshape(images.shape)
