"""miniImageNet (Vinyals et al. 2016), with the split of Ravi & Larochelle (2017)."""

from __future__ import annotations

import torch

from metarun.core.types import SPLITS, SourceSetup, Split
from metarun.data.augmentation import NO_AUGMENTATION, Augmentation
from metarun.data.episodes import ClassEpisodes, Classes, ClassTable
from metarun.data.storage import registry
from metarun.data.storage.cache import Store, open_store
from metarun.data.storage.image_files import Photograph
from metarun.data.storage.miniimagenet_files import SIZE

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class MiniImageNet(ClassEpisodes):
    """64 train, 16 val and 20 test classes of 600 photographs, after `metarun data miniimagenet`.

    Args:
        root: Folder of the data sets; None is `$METARUN_DATA`, or see `default_root`.
        classes: See `ClassEpisodes`.
        normalize: Whether to normalize each channel with ImageNet's mean and standard deviation.
        augmentation: Changes of training images.
    """

    def __init__(
        self,
        setup: SourceSetup,
        *,
        root: str | None = None,
        classes: Classes = "split",
        normalize: bool = True,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> None:
        super().__init__(
            setup,
            name="miniimagenet",
            tables=stored_tables(root),
            classes=classes,
            augmentation=augmentation.padded("reflection"),
            mean=MEAN if normalize else None,
            std=STD if normalize else None,
            prepare=Photograph(SIZE, crop=False),
        )


def stored_tables(root: str | None) -> dict[Split, ClassTable]:
    """Return the tables of all photographs, 84 x 84 pixels in color.

    Raises:
        ValueError: They are not stored.
    """
    absent = registry.missing("miniimagenet", root)
    store = open_store(registry.resolve_root(root) / "miniimagenet")
    if absent is not None or store is None:
        raise ValueError(absent)
    return {split: _table(store, split) for split in SPLITS}


def _table(store: Store, split: Split) -> ClassTable:
    return ClassTable(
        images=torch.from_numpy(store.array(split)),
        names=tuple(store.facts["classes"][split]),
        counts=tuple(store.facts["counts"][split]),
        digest=store.digest(split),
    )
