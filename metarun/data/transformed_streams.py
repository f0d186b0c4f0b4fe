"""Streams of the same classes seen in another way by each task: turned, permuted, colored.

Shapes: T trajectories, J tasks in each, W classes, K rows of a class in a task, P images of a
class that the tasks share, Q held-out rows of a class, R = W K or W Q, C H W images.
"""

from __future__ import annotations

import hashlib
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from metarun.core import seeding
from metarun.core.types import SPLITS, EpisodeSize, Split, Stream, TaskBatch
from metarun.data.augmentation import places_of, warp
from metarun.data.episodes import ClassEpisodes, ClassTable
from metarun.data.omniglot import small_tables
from metarun.data.storage.image_files import photograph

Source = Literal["digits", "omniglot_small"]

_SLOT_ANGLE, _SLOT_PERMUTATION, _SLOT_LOOKS = 40, 41, 42
_SLOT_SHARED, _SLOT_ORDER = 43, 44
_COLORS = (
    (0.9, 0.1, 0.1), (0.9, 0.5, 0.0), (0.9, 0.9, 0.1), (0.1, 0.7, 0.1), (0.1, 0.7, 0.9),
    (0.1, 0.1, 0.9), (0.6, 0.1, 0.8),
)  # fmt: skip
_NUM_SCALES, _NUM_TURNS = 2, 4


class TransformedStream(ClassEpisodes):
    """Trajectories of tasks that ask for the same `way` classes, each of images changed its way.

    A task shows `shot` images of each class, in random order, drawn from `pool` that all tasks
    of the trajectory share, and holds out `query` that no task shows. A class keeps its label.

    Args:
        source: `digits`, the 1,797 handwritten ones that come with scikit-learn (8x8, enlarged
            to 16x16; every split has images of all ten), or `omniglot_small` (each split has
            classes of its own).
        tasks: J.
        pool: P, or as many as a class has beyond those held out.
        rows: Rows that arrive together, in one step.
        task_ids_known: Whether a learner may know when a task begins and which one it is.
        sizes, seed, eval_seed, device, dtype, val_way: See `ClassEpisodes`.

    Raises:
        ValueError: A number or a word is out of range, or scikit-learn is not installed.
    """

    channels: ClassVar[int] = 1
    """Of the changed images."""
    most_tasks: ClassVar[int | None] = None
    """Different ways to change images; None where there is no end of them."""

    def __init__(
        self,
        *,
        source: Source = "digits",
        tasks: int = 20,
        pool: int = 50,
        rows: int = 10,
        task_ids_known: bool = True,
        sizes: Mapping[Split, EpisodeSize],
        seed: int,
        eval_seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        val_way: int | None = None,
    ) -> None:
        if source not in ("digits", "omniglot_small"):
            raise ValueError(f"data.source={source}: expected digits or omniglot_small")
        for name, value in (("tasks", tasks), ("pool", pool), ("rows", rows)):
            if value < 1:
                raise ValueError(f"data.{name}={value} is out of range: 1 or more is allowed")
        if self.most_tasks is not None and tasks > self.most_tasks:
            raise ValueError(
                f"data.tasks={tasks} is out of range: there are {self.most_tasks} ways to look"
            )
        tables = digits() if source == "digits" else small_tables("antialias", 28)
        side = tables["test"].images.shape[-1]
        super().__init__(
            name=source,
            tables=tables,
            sizes=sizes,
            val_way=val_way,
            seed=seed,
            eval_seed=eval_seed,
            device=device,
            dtype=dtype,
            prepare=lambda image: photograph(image, side, crop=True, grayscale=True),
        )
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
        """Draw trajectories `index … index + num_tasks - 1` of a split."""
        size, data = self.sizes[split], self._on_device(split)
        keys = seeding.task_keys(self._seeds[split], split, index, num_tasks, self.device)
        classes, _ = self._choose_classes(split, data, keys)
        pool = self._pools[split]
        picks = self._choose_images(data, keys, classes, pool + size.query)
        picks = picks + data.starts[classes][..., None]
        owners = seeding.fold(keys[:, None], torch.arange(self._tasks, device=self.device))
        # (T, J, W): each class of each task draws from the pool by itself.
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

    def prepare(self, images: Any) -> Tensor:
        """As `ClassEpisodes.prepare`, unchanged by any task."""
        rows = super().prepare(images)
        return rows.expand(-1, self.channels, -1, -1)

    def fingerprint(self) -> str:
        """A hash of the images, of the way they are changed, and of the layout."""
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
        """The images (T, J, R, C, H, W) of each task, changed its way.

        Args:
            images: (T, J, R, 1, H, W) in [0, 1], as they are.
            keys: (T,) of the trajectories.
        """

    def _changed(self, split: Split, data: Any, keys: Tensor, index: Tensor) -> Tensor:
        """(T, J R, C, H, W) the images of an index (T, J, R)."""
        images = self._inputs(split, data, keys, index.flatten(1))
        return self.change(images.unflatten(1, index.shape[1:]), keys).flatten(1, 2)

    def _shared(self, split: Split, pool: int) -> int:
        """Images of a class that the tasks of a trajectory share."""
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
    """Each task turns its images by an angle of its own, growing from task to task.

    As MNIST rotations of Lopez-Paz & Ranzato (2017): task j draws its angle evenly from the j-th
    part of [0, 180) degrees.
    """

    def change(self, images: Tensor, keys: Tensor) -> Tensor:
        part = seeding.uniform(keys, _SLOT_ANGLE, (self._tasks,), dtype=torch.float64)
        task = torch.arange(self._tasks, device=self.device)
        angle = math.pi * (task + part) / self._tasks
        return _moved(images, angle, torch.ones_like(angle))


class PermutedStream(TransformedStream):
    """Each task shuffles the pixels of its images in its own order (Goodfellow et al. 2014)."""

    def change(self, images: Tensor, keys: Tensor) -> Tensor:
        owners = seeding.fold(keys[:, None], torch.arange(self._tasks, device=self.device))
        pixels = images.shape[-2] * images.shape[-1]
        order = seeding.choose(owners, _SLOT_PERMUTATION, pixels, pixels)
        flat = images.flatten(-2)
        index = order[:, :, None, None].expand_as(flat)
        shuffled: Tensor = flat.gather(-1, index).unflatten(-1, images.shape[-2:])
        return shuffled


class RainbowStream(TransformedStream):
    """Rainbow MNIST's 56 looks: 7 colors of the background, 2 scales, 4 quarter turns.

    Finn et al. (2019, section 5.2); the looks come in random order.
    """

    channels = 3
    most_tasks = len(_COLORS) * _NUM_SCALES * _NUM_TURNS

    def change(self, images: Tensor, keys: Tensor) -> Tensor:
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
    """Images (T, J, R, C, H, W) turned by angles (T, J) in radians, and `zoom` times smaller."""
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    zero = torch.zeros_like(cos)
    maps = torch.stack([torch.stack([cos, -sin, zero]), torch.stack([sin, cos, zero])])
    grid = places_of(maps.flatten(2).to(images.dtype), images)
    rows = images.flatten(0, 1)
    grid = grid[:, :, None].expand(-1, -1, rows.shape[1], -1, -1).flatten(1, 2)
    return warp(rows.flatten(0, 1), grid, "zeros").reshape(images.shape)


@lru_cache(maxsize=1)
def digits() -> dict[Split, ClassTable]:
    """Scikit-learn's handwritten digits, a third of each one's images in every split.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "data.source=digits needs scikit-learn: pip install 'metarun[sklearn]', or use "
            "data.source=omniglot_small"
        ) from error
    bunch = load_digits()
    drawn = torch.from_numpy(np.asarray(bunch.images, dtype=np.float32))[:, None] / 16.0
    large = torch.nn.functional.interpolate(drawn, size=(16, 16), mode="bilinear")
    images = (large * 255.0).round().clamp(0, 255).to(torch.uint8)
    target = np.asarray(bunch.target)
    tables: dict[Split, ClassTable] = {}
    # By turns, since the images of a writer follow each other.
    parts: dict[Split, set[int]] = {"train": {0}, "val": {1}, "test": {2}}
    for split, places in parts.items():
        rows = [
            [
                row
                for place, row in enumerate(np.flatnonzero(target == digit))
                if place % 3 in places
            ]
            for digit in range(10)
        ]
        tables[split] = ClassTable(
            images=images[torch.tensor([row for part in rows for row in part])],
            names=tuple(str(digit) for digit in range(10)),
            counts=tuple(len(part) for part in rows),
        )
    return tables
