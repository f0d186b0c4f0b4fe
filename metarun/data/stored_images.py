"""Image data sets from a store of all their images, with a published or a hashed split.

CIFAR-FS (Bertinetto et al. 2019) and FC100 (Oreshkin et al. 2018) are splits of CIFAR-100; tests
across domains and streams use others, such as MNIST.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from metarun.core import seeding
from metarun.core.checks import within
from metarun.core.types import SPLITS, SourceSetup, Split
from metarun.data.augmentation import NO_AUGMENTATION, Augmentation
from metarun.data.conversion import LUMA, converted
from metarun.data.episodes import ClassEpisodes, ClassTable, all_in_each
from metarun.data.splits import check_fractions, hashed_split
from metarun.data.storage import registry
from metarun.data.storage.cache import Store, open_store
from metarun.data.storage.image_files import Photograph
from metarun.data.storage.image_sets import (
    IMAGES,
    TEST_COUNTS,
    groups_of,
    moments,
    published_split,
)
from metarun.data.storage.torchvision_sets import PUBLISHED, store_name

SplitName = Literal["cifar_fs", "fc100", "cub", "tiered_imagenet", "aircraft", "dtd", "flowers"]


class StoredImages(ClassEpisodes):
    """Classes of a data set that `metarun data NAME` has stored.

    Args:
        setup: See `ClassEpisodes`.
        name: Name of the images.
        split: Published split of their classes; `hashed` splits them by a hash of their names.
            None is a published one where there is one.
        classes: `split` has the classes of each part of the split. `all` has all classes in each
            part, for a meta-test on the whole data set.
        root: Folder of the data sets; None is `$METARUN_DATA`, or see `default_root`.
        image_size: Side of the images in pixels; None is the stored one.
        channels: 1 for gray levels, 3 for colors; None is the stored number.
        val_fraction, test_fraction: Share of the classes for val and for test of a hashed split.
        augmentation: Changes of training images.

    Raises:
        ValueError: The data set is not stored, or an option is out of range.
    """

    found_in_files = ("image_size", "channels")
    published: Mapping[str, SplitName | Literal["hashed"]] = {}
    """Default splits by the names of the images."""

    def __init__(
        self,
        setup: SourceSetup,
        *,
        name: str | None = None,
        split: SplitName | Literal["hashed"] | None = None,
        classes: Literal["split", "all"] = "split",
        root: str | None = None,
        image_size: int | None = None,
        channels: Literal[1, 3] | None = None,
        val_fraction: float = 0.2,
        test_fraction: float = 0.25,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> None:
        within("data", "[8, 512]", image_size=image_size)
        check_fractions(val_fraction, test_fraction)
        if name is None:
            raise ValueError(
                "data.name=null: expected the name of a data set, such as data.name=DTD"
            )
        split = split or self.published.get(name, "hashed")
        images = self.store_name(name)
        absent = registry.missing_store(images, root, *self.words_of(name))
        store = open_store(registry.resolve_root(root) / images)
        if absent is not None or store is None:
            raise ValueError(absent)
        names: list[str] = store.facts["classes"]
        pixels = store.array(IMAGES)
        side, channels = image_size or pixels.shape[-1], channels or pixels.shape[1]
        self.resolved_options = {"image_size": side, "channels": channels}
        if classes == "all":
            chosen = dict.fromkeys(SPLITS, names)
            self.notes_for_user = (all_in_each(names),)
        elif split == "hashed":
            chosen = hashed_split(names, images, val_fraction, test_fraction)
        else:
            chosen = published_split(split, names)
        tables = class_tables(store, chosen, side, channels)
        mean, std = moments(store, [names.index(name) for name in tables["train"].names])
        if channels != pixels.shape[1]:
            mean, std = _other_channels(mean, std, channels)
        super().__init__(
            setup,
            name=f"{images} ({split})",
            tables=tables,
            augmentation=augmentation.padded("reflection" if pixels.shape[1] == 3 else "zeros"),
            mean=mean,
            std=std,
            prepare=Photograph(side, crop=True, grayscale=channels == 1),
        )

    def store_name(self, name: str) -> str:
        """Return the name of the store of a data set."""
        return name

    def words_of(self, name: str) -> tuple[str, ...]:
        """Return how a data set is named after `metarun data`, and in the options, if otherwise."""
        return (self.store_name(name),)


class TorchvisionImages(StoredImages):
    """A classification data set of torchvision, by the name of its class in torchvision.datasets.

    The default split is Meta-Dataset's where it has one.
    """

    published = PUBLISHED

    def store_name(self, name: str) -> str:
        """Return the name of the store of a data set."""
        return store_name(name)

    def words_of(self, name: str) -> tuple[str, ...]:
        """Return how a data set is named after `metarun data`, and in the options."""
        return f"torchvision {name}", f"data=torchvision data.name={name}"


def class_tables(
    store: Store, chosen: Mapping[Split, Sequence[str]], side: int, channels: int
) -> dict[Split, ClassTable]:
    """Return tables of the chosen classes of a store, all their images.

    Args:
        store: The store.
        chosen: Names of the classes of each split. Splits of the same classes share one table.
        side, channels: Of the images.
    """
    names: list[str] = store.facts["classes"]
    numbers = {name: number for number, name in enumerate(names)}
    groups = groups_of(store.folder.name)
    kept: dict[tuple[int, ...], ClassTable] = {}
    tables: dict[Split, ClassTable] = {}
    for split in SPLITS:
        # The classes of a group are adjacent.
        own = sorted((numbers[n] for n in chosen[split]), key=lambda i: groups.get(names[i], ""))
        if (key := tuple(own)) not in kept:
            kept[key] = _table(store, own, groups, side, channels)
        tables[split] = kept[key]
    return tables


def row_tables(
    store: Store,
    side: int,
    channels: int,
    *,
    val_fraction: float,
    test_fraction: float | None,
) -> dict[Split, ClassTable]:
    """Return tables that all have every class of a store, each with rows of its own.

    Args:
        store: The store.
        side, channels: Of the images.
        val_fraction: Share of the rows for val, of those that are not in the published test half.
        test_fraction: Share of the rows of test, by a hash of the row's number; None is the
            published test half.
    """
    names: list[str] = store.facts["classes"]
    counts: list[int] = store.facts["counts"]
    parts: dict[Split, list[torch.Tensor]] = {split: [] for split in SPLITS}
    start = 0
    for number, (name, count) in enumerate(zip(names, counts, strict=True)):
        rest = count - store.facts[TEST_COUNTS][number] if test_fraction is None else count
        hashes = seeding.fold(seeding.key("rows", name), torch.arange(rest))
        order = start + hashes.argsort(stable=True)
        if test_fraction is None:
            test = torch.arange(start + rest, start + count)
        else:
            test, order = order.tensor_split([round(test_fraction * count)])
        val, train = order.tensor_split([round(val_fraction * rest)])
        for split, rows in zip(SPLITS, (train, val, test), strict=True):
            parts[split].append(rows.sort().values)
        start += count
    pixels = store.array(IMAGES)
    facts = f"{store.digest(IMAGES)} {side} {channels} {val_fraction} {test_fraction}"
    return {
        split: ClassTable(
            images=converted(torch.from_numpy(pixels[torch.cat(rows).numpy()]), channels, side),
            names=tuple(names),
            counts=tuple(map(len, rows)),
            digest=f"{facts} {split}",
        )
        for split, rows in parts.items()
    }


def _table(
    store: Store, classes: list[int], groups: dict[str, str], side: int, channels: int
) -> ClassTable:
    """Return the table of some classes of a store."""
    counts, names = store.facts["counts"], store.facts["classes"]
    ends = np.cumsum(counts)
    starts = ends - counts
    pixels = store.array(IMAGES)
    if [*range(classes[0], classes[-1] + 1)] == classes:
        # A view: the images of a large data set stay on the disk until they are read.
        rows = pixels[starts[classes[0]] : ends[classes[-1]]]
    else:
        rows = np.concatenate([pixels[starts[i] : ends[i]] for i in classes])
    own = [names[i] for i in classes]
    facts = f"{store.digest(IMAGES)} {side} {channels}"
    return ClassTable(
        images=converted(torch.from_numpy(rows), channels, side),
        names=tuple(own),
        counts=tuple(counts[i] for i in classes),
        groups=tuple(groups[name] for name in own) if groups else None,
        digest=facts,
    )


def _other_channels(
    mean: tuple[float, ...], std: tuple[float, ...], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return moments of images whose channels were joined or repeated; joined ones nearly."""
    if channels == 3:
        return mean * 3, std * 3
    return (float(np.dot(LUMA, mean)),), (float(np.dot(LUMA, std)),)
