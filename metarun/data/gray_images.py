"""Gray images of any data set, for streams of transformed images: tables by its name.

Shapes: H W images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from metarun.core.checks import within
from metarun.core.types import Split
from metarun.data.episodes import ClassTable
from metarun.data.miniimagenet import stored_tables
from metarun.data.omniglot import full_tables, small_tables
from metarun.data.splits import check_fractions
from metarun.data.storage import registry
from metarun.data.storage.cache import open_store
from metarun.data.storage.image_files import DRAWING_SIZE, Drawing, Photograph
from metarun.data.storage.image_sets import IMAGES, TEST_COUNTS, published_split
from metarun.data.storage.omniglot_files import ORIGINAL_SIDE
from metarun.data.storage.torchvision_sets import PUBLISHED
from metarun.data.stored_images import SplitName, class_tables, row_tables

Division = Literal["published", "rows"]

_SPLITS: dict[str, SplitName] = {
    "cifar_fs": "cifar_fs",
    "fc100": "fc100",
    "cub": "cub",
    "tiered_imagenet": "tiered_imagenet",
    **PUBLISHED,
}
"""Published splits of the classes, by the names of the data sets."""


@dataclass(frozen=True, slots=True)
class GrayImages:
    """Images of one channel.

    Attributes:
        tables: Images of each split.
        prepare: How another image becomes one of them.
        notes: What a user should know of the split.
    """

    tables: Mapping[Split, ClassTable]
    prepare: Photograph | Drawing
    notes: tuple[str, ...] = ()


def gray_images(
    source: str,
    *,
    root: str | None = None,
    image_size: int | None = None,
    split: Division = "published",
    val_fraction: float = 0.2,
    test_fraction: float = 0.25,
) -> GrayImages:
    """Return the images of a data set, with rows of their own in each split.

    Args:
        source: Name of the data set, see `registry.store_of_source`.
        root: Folder of the data sets; None is `$METARUN_DATA`, or see `default_root`.
        image_size: Side of the images in pixels; None is the stored one.
        split: `published` is the split of the classes in the papers. Where there is none, as for
            MNIST, every split has all classes, and test has the published test half. `rows` gives
            every split all classes, and divides their rows by a hash.
        val_fraction: Share of the rows for val where rows are divided, without the test half.
        test_fraction: Share of the rows for test where the test half does not decide.

    Raises:
        ValueError: The data set is unknown or not stored, or an option is out of range.
    """
    within("data", "[8, 512]", image_size=image_size)
    check_fractions(val_fraction, test_fraction)
    name = registry.store_of_source(source, root)
    if split == "rows" and (name is None or source in ("omniglot", "miniimagenet")):
        raise ValueError(
            f"data.split=rows: data.source={source} has one split: use data.split=published"
        )
    if source in ("omniglot", "omniglot_small"):
        side = image_size or DRAWING_SIZE
        within("data", f"[8, {ORIGINAL_SIDE}]", image_size=side)
        if source == "omniglot_small":
            return GrayImages(small_tables("antialias", side), Drawing("antialias", side))
        return GrayImages(
            full_tables(root, "vinyals", "antialias", side), Drawing("antialias", side)
        )
    if source == "digits":
        return _converted(digits(), image_size)
    if source == "miniimagenet":
        return _converted(stored_tables(root), image_size)
    assert name is not None
    store = open_store(registry.resolve_root(root) / name)
    assert store is not None
    side = image_size or store.array(IMAGES).shape[-1]
    prepare = Photograph(side, crop=True, grayscale=True)
    if split == "published" and source in _SPLITS:
        chosen = published_split(_SPLITS[source], store.facts["classes"])
        return GrayImages(class_tables(store, chosen, side, 1), prepare)
    has_half = store.facts.get(TEST_COUNTS) is not None
    tables = row_tables(
        store,
        side,
        1,
        val_fraction=val_fraction,
        test_fraction=None if has_half and split == "published" else test_fraction,
    )
    if split == "rows" or has_half:
        return GrayImages(tables, prepare)
    note = (
        f"data.source={source}: no published test half is stored, so rows are divided by a hash "
        f"(test {test_fraction:g}, val {val_fraction:g})"
    )
    return GrayImages(tables, prepare, (note,))


def _converted(tables: Mapping[Split, ClassTable], side: int | None) -> GrayImages:
    side = side or tables["test"].images.shape[-1]
    gray = {split: table.converted(1, side) for split, table in tables.items()}
    return GrayImages(gray, Photograph(side, crop=True, grayscale=True))


@lru_cache(maxsize=1)
def digits() -> dict[Split, ClassTable]:
    """Return scikit-learn's handwritten digits, with a third of each class in every split.

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
    # Interleaved, because the images of a writer are adjacent.
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
