"""Tasks from several data sets of images: each training step takes its tasks from one of them.

Shapes: M sources, T tasks, C H W images.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from metarun.core import seeding
from metarun.core.checks import within
from metarun.core.types import SPLITS, Parts, SourceSetup, Split, TaskBatch, TaskSpec
from metarun.data.episodes import ClassEpisodes, PreparesImages
from metarun.data.preparation import Preparation
from metarun.data.storage.image_files import Photograph

_MIDDLE = 0.5
"""Mean and standard deviation by which pixels in [0, 1] become rows in [-1, 1], as in the code of
Meta-Dataset: no source's own moments suit the others."""


class Mixed(PreparesImages):
    """Tasks of several data sets, with images of one size and number of channels.

    The source of a training step is a function of (seed, step), drawn by `weights`. The episodes of
    val and test are of each source in turn: episode i is the episode i // M of source i % M.
    A class has its number in its source, after the classes of the sources before it.

    Args:
        setup: See `ClassEpisodes`.
        parts: The data sets by name, from `sources` and `options`.
        sources: Names of the data sets, as in `data=NAME`.
        weights: Share of the training steps of each source; None is the same for all.
        image_size: Side of the images in pixels.
        channels: 1 for gray levels, 3 for colors.
        options: Options of single sources, by name.

    Attributes:
        names: Names of the sources.

    Raises:
        ValueError: A source has no tasks of images, or an option is out of range.
    """

    sizes_may_vary: ClassVar[bool] = True

    def __init__(
        self,
        setup: SourceSetup,
        *,
        parts: Parts | None = None,
        sources: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        image_size: int = 32,
        channels: Literal[1, 3] = 3,
        options: Mapping[str, Any] | None = None,  # noqa: ARG002
    ) -> None:
        within("data", "[8, 512]", image_size=image_size)
        if parts is None or not sources:
            raise ValueError(
                "data=mixed needs data.sources=[NAME,NAME,…], names of data sets of images "
                "(`metarun list data`)"
            )
        self.names = tuple(sources)
        self.device = setup.device
        self._seed = setup.seed
        self._tasks_per_step = setup.tasks_per_step
        self._ends = _ends(weights, self.names)
        shape = channels, image_size, image_size
        self.preparation = Preparation(
            Photograph(image_size, crop=True, grayscale=channels == 1),
            [_MIDDLE] * channels,
            [_MIDDLE] * channels,
            setup.device,
            setup.dtype,
        )
        self._parts = [
            _built(name, parts, setup, shape).as_for(shape, self.preparation) for name in self.names
        ]
        notes = [getattr(part, "notes_for_user", ()) for part in self._parts]
        self.notes_for_user = tuple(itertools.chain.from_iterable(notes))
        self.sizes = {
            split: max((part.sizes[split] for part in self._parts), key=lambda size: size.way)
            for split in SPLITS
        }
        self.spec = self._spec(shape)

    def batch(self, split: Split, index: int, num_tasks: int) -> TaskBatch:
        """Return tasks `index … index + num_tasks - 1` of a split, whose sizes have to agree."""
        return TaskBatch.joined(
            [
                self._of_one_source(split, first, count)
                for first, count in self._pieces(split, index, num_tasks)
            ]
        )

    def layout(self, split: Split, index: int) -> Hashable:
        """Return the source and the size of a task, see `HasLayouts`."""
        place, own = self._place(split, index)
        return place, self._parts[place].layout(split, own)

    def source_of(self, split: Split, index: int) -> int:
        """Return the position in `names` of the source of a task."""
        return self._place(split, index)[0]

    def fingerprint(self) -> str:
        """Return a hash of the sources and their data."""
        facts = [f"{n}:{p.fingerprint()}" for n, p in zip(self.names, self._parts, strict=True)]
        return hashlib.sha256(";".join(facts).encode()).hexdigest()[:16]

    def as_for(self, shape: tuple[int, ...], preparation: Preparation) -> Mixed:
        """Return these tasks for a learner of other images; see `ClassEpisodes.as_for`."""
        other = copy.copy(self)
        other._parts = [part.as_for(shape, preparation) for part in self._parts]
        other.preparation = preparation
        other.spec = replace(self.spec, input_shape=shape)
        return other

    def all_rows(self, split: Split, at_once: int = 250) -> Iterator[Tensor]:
        """Yield the inputs of a split, source by source; see `HasRowsOfClasses`."""
        for part in self._parts:
            yield from part.all_rows(split, at_once)

    def counts(self, split: Split) -> tuple[int, ...]:
        """Return the number of rows of each class of a split."""
        return tuple(itertools.chain.from_iterable(part.counts(split) for part in self._parts))

    def num_classes(self, split: Split) -> int:
        """Return the number of classes of a split."""
        return sum(part.num_classes(split) for part in self._parts)

    def class_names(self, split: Split) -> tuple[str, ...]:
        """Return the name of each class of a split, after that of its source."""
        pairs = zip(self.names, self._parts, strict=True)
        return tuple(f"{name}/{own}" for name, part in pairs for own in part.class_names(split))

    def _spec(self, shape: tuple[int, ...]) -> TaskSpec:
        specs = [part.spec for part in self._parts]
        shots = {spec.train_shot for spec in specs}
        return replace(
            specs[0],
            input_shape=shape,
            output_dim=self.sizes["test"].way,
            train_way=self.sizes["train"].way,
            train_shot=shots.pop() if len(shots) == 1 else None,
            num_train_classes=self.num_classes("train"),
        )

    def _place(self, split: Split, index: int) -> tuple[int, int]:
        """Return the source of a task, and the index of the task there."""
        if split != "train":
            number = len(self._parts)
            return index % number, index // number
        drawn = seeding.key(self._seed, "source", index // self._tasks_per_step) % 2**53 * 2.0**-53
        return next(place for place, end in enumerate(self._ends) if drawn < end), index

    def _pieces(self, split: Split, index: int, num_tasks: int) -> Iterator[tuple[int, int]]:
        """Yield the first task and the number of tasks of each part from one source."""
        together, end = self._tasks_per_step if split == "train" else 1, index + num_tasks
        while index < end:
            following = min((index // together + 1) * together, end)
            yield index, following - index
            index = following

    def _of_one_source(self, split: Split, index: int, num_tasks: int) -> TaskBatch:
        place, own = self._place(split, index)
        batch = self._parts[place].batch(split, own, num_tasks)
        before = sum(part.num_classes(split) for part in self._parts[:place])
        assert batch.class_ids is not None
        return replace(batch, class_ids=batch.class_ids + before)


def _built(
    name: str, parts: Parts, setup: SourceSetup, shape: tuple[int, int, int]
) -> ClassEpisodes:
    """Build a source, with the size and the channels of the mixture where it has such options.

    Raises:
        ValueError: It has no tasks of images.
    """
    make = parts[name]
    kind: Any = make.func
    if not issubclass(kind, ClassEpisodes) or not kind.sizes_may_vary:
        raise ValueError(
            f"data.sources: {name} has no classes of images: expected names such as "
            "omniglot_small and cifar_fs (`metarun list data`)"
        )
    common = {"image_size": shape[1], "channels": shape[0]}
    made = make(setup, **{key: own for key, own in common.items() if key in make.keywords})
    assert isinstance(made, ClassEpisodes)
    return made


def _ends(weights: Sequence[float] | None, names: Sequence[str]) -> list[float]:
    """Return the ends of the parts of [0, 1] that belong to the sources.

    Raises:
        ValueError: The weights do not fit the sources.
    """
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"data.sources has {repeated} twice: give it a larger weight")
    own = [1.0] * len(names) if weights is None else list(weights)
    typed = ",".join(f"{weight:g}" for weight in own)
    if len(own) != len(names) or min(own) < 0.0 or not sum(own) > 0.0:
        raise ValueError(
            f"data.weights=[{typed}]: expected {len(names)} numbers of 0 or more, one for each of "
            "data.sources, not all 0"
        )
    ends = list(itertools.accumulate(own))
    # The last one is 1 exactly, whatever rounding makes of sums.
    return [end / ends[-1] for end in ends]
