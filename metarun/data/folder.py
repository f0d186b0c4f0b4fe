"""Data set of a user's own images, with one folder per class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from metarun.core import seeding
from metarun.core.checks import at_least, within
from metarun.core.types import SPLITS, EpisodeSize, SourceSetup, Split
from metarun.data.augmentation import Augmentation
from metarun.data.episodes import ClassEpisodes, ClassTable
from metarun.data.storage import registry
from metarun.data.storage.cache import Pixels
from metarun.data.storage.image_files import SUFFIXES, open_image, photograph
from metarun.data.storage.prepared_images import KEPT_FROM, Prepared, prepared

_WORDS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("val", "validation", "valid"),
    "test": ("test",),
}

Classes = dict[str, list[Path]]


@dataclass(frozen=True, slots=True)
class Listing:
    """Paths of the images of each class in each split."""

    splits: dict[Split, Classes]

    @property
    def num_images(self) -> int:
        """Number of images in all splits."""
        return sum(len(self.files(split)) for split in self.splits)

    def files(self, split: Split) -> list[Path]:
        """Return the files of a split, grouped by class."""
        return [file for files in self.splits[split].values() for file in files]


class Folder(ClassEpisodes):
    """Images in a folder of class folders.

    `root` holds either `train`, `val` and `test` folders of class folders, or the class folders
    themselves, which are then split by a hash of their names. Images are cropped to the central
    square and normalized with the mean and standard deviation of the train split. Large sets are
    cached on disk after decoding (see `prepared`).

    Args:
        root: Folder of the images.
        image_size: Side of the prepared images in pixels.
        grayscale: Whether images have one channel instead of three.
        min_per_class: Smallest number of images of a class, below which it is left out; None
            keeps all classes.
        val_fraction, test_fraction: Share of the classes for val and for test, if there are no
            split folders.
        flip, color, affine_degrees, affine_translate, affine_scale, affine_shear: See
            `Augmentation`.
    """

    def __init__(
        self,
        setup: SourceSetup,
        *,
        root: str | None = None,
        image_size: int = 84,
        grayscale: bool = False,
        min_per_class: int | None = None,
        val_fraction: float = 0.2,
        test_fraction: float = 0.2,
        flip: bool = False,
        color: float = 0.0,
        affine_degrees: float = 0.0,
        affine_translate: float = 0.0,
        affine_scale: float = 0.0,
        affine_shear: float = 0.0,
    ) -> None:
        within("data", "[8, 512]", image_size=image_size)
        listing = list_folder(
            root,
            min_per_class=min_per_class,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
        )
        check_listing(listing, setup.sizes)
        _check_memory(listing.num_images, image_size, 1 if grayscale else 3)
        pictures = prepared(
            {split: listing.files(split) for split in SPLITS},
            Path(root or "").expanduser(),
            {
                "image_size": image_size,
                "grayscale": grayscale,
                # They select the images and not the pixels: each choice has its own cache.
                "min_per_class": min_per_class,
                "val_fraction": val_fraction,
                "test_fraction": test_fraction,
            },
            lambda: read_pictures(listing, image_size, grayscale=grayscale),
        )
        super().__init__(
            setup,
            name=f"folder {root}",
            tables={
                split: ClassTable(
                    images=torch.from_numpy(pictures.images[split]),
                    names=tuple(listing.splits[split]),
                    counts=tuple(map(len, listing.splits[split].values())),
                    digest=pictures.digests[split],
                )
                for split in SPLITS
            },
            augmentation=Augmentation(
                affine_degrees=affine_degrees,
                affine_translate=affine_translate,
                affine_scale=affine_scale,
                affine_shear=affine_shear,
                flip=flip,
                color=color,
                padding="reflection",
            ),
            mean=pictures.mean,
            std=pictures.std,
            prepare=lambda image: photograph(image, image_size, crop=True, grayscale=grayscale),
            can_drop=True,
        )


def list_folder(
    root: str | None,
    *,
    min_per_class: int | None = None,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
) -> Listing:
    """Find the classes of each split without reading an image.

    Args:
        root: Folder of the images.
        min_per_class: See `Folder`.
        val_fraction, test_fraction: See `Folder`.

    Raises:
        ValueError: The folder does not exist, or has another layout.
    """
    at_least("data", 1, min_per_class=min_per_class)
    within("data", "(0, 1)", val_fraction=val_fraction, test_fraction=test_fraction)
    if val_fraction + test_fraction >= 1.0:
        raise ValueError(
            f"data.val_fraction={val_fraction} and data.test_fraction={test_fraction} leave no "
            "class to train on: their sum has to be less than 1"
        )
    absent = registry.missing("folder", root)
    if absent is not None or root is None:
        raise ValueError(absent)
    base = Path(root).expanduser()
    folders = _split_folders(base)
    if folders:
        return Listing(_disjoint(base, {s: _classes(f, min_per_class) for s, f in folders.items()}))
    return Listing(_hashed_split(_classes(base, min_per_class), base, val_fraction, test_fraction))


def _split_folders(base: Path) -> dict[Split, Path]:
    found: dict[Split, Path] = {}
    for split, words in _WORDS.items():
        for word in words:
            if (base / word).is_dir():
                found[split] = base / word
                break
    if "train" not in found or len(found) == 1:
        return {}
    for split in SPLITS:
        if split not in found:
            raise ValueError(
                f"data.root={base} has {' and '.join(f'{p.name}/' for p in found.values())} but no "
                f"{split}/: add it, or put all classes into one folder for an automatic split"
            )
    return found


def _classes(folder: Path, min_per_class: int | None) -> Classes:
    found: Classes = {}
    for child in sorted(folder.iterdir()):
        if not child.is_dir() or child.name.startswith((".", "__")):
            continue
        files = sorted(
            file
            for file in child.iterdir()
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        )
        if min_per_class is None and not files:
            raise ValueError(
                f"{child} has no images: put some in, or set data.min_per_class=1 to leave out "
                "such folders"
            )
        if len(files) >= (min_per_class or 1):
            found[child.name] = files
    if not found:
        least = "" if min_per_class is None else f" with {min_per_class} images or more"
        raise ValueError(
            f"{folder} has no class folders{least}: one folder for each class is expected"
        )
    return found


def _disjoint(base: Path, splits: dict[Split, Classes]) -> dict[Split, Classes]:
    owner: dict[str, Split] = {}
    for split, classes in splits.items():
        for name in classes:
            if name in owner:
                raise ValueError(
                    f"data.root={base}: class {name} is in {owner[name]} and in {split}, but "
                    "splits must not share classes: put all classes into one folder for an "
                    "automatic split"
                )
            owner[name] = split
    return splits


def _hashed_split(
    classes: Classes, base: Path, val_fraction: float, test_fraction: float
) -> dict[Split, Classes]:
    """Split classes by a hash of their names, which does not depend on the folder's path."""
    num_val = max(2, round(val_fraction * len(classes)))
    num_test = max(2, round(test_fraction * len(classes)))
    if len(classes) < num_val + num_test + 2:
        raise ValueError(
            f"data.root={base} has {len(classes)} classes, 6 or more are needed for disjoint "
            "train, val and test splits"
        )
    order = sorted(classes, key=lambda name: seeding.key("folder", name))
    chosen: dict[Split, list[str]] = {
        "train": order[num_val + num_test :],
        "val": order[num_test : num_val + num_test],
        "test": order[:num_test],
    }
    return {
        split: {name: classes[name] for name in sorted(names)} for split, names in chosen.items()
    }


def check_listing(listing: Listing, sizes: Mapping[Split, EpisodeSize]) -> None:
    """Check that classes have enough images for a task, before any image is read."""
    # In the order of `sizes`: evaluation first, because users set its keys.
    for split in sizes:
        for name, files in listing.splits[split].items():
            needed = sizes[split].shot + sizes[split].query
            if len(files) < needed:
                size, count = sizes[split], len(files)
                keys = "train." if split == "train" else ""
                lower = (
                    f"lower {keys}query to {count - size.shot}"
                    if count > size.shot
                    else "add images"
                )
                raise ValueError(
                    f"class {name} has {count} images, {size.shot}+{size.query} are needed: "
                    f"{lower} or set data.min_per_class={needed} to drop it"
                )


def read_pictures(listing: Listing, size: int, *, grayscale: bool) -> Prepared:
    """Decode the images of all splits.

    Raises:
        ValueError: An image cannot be read; the message names it.
    """
    images = {split: _decoded(listing.files(split), size, grayscale=grayscale) for split in SPLITS}
    mean, std = _moments(torch.from_numpy(images["train"]))
    digests = {split: hashlib.sha256(pixels.data).hexdigest() for split, pixels in images.items()}
    return Prepared(images, digests, mean, std)


def _decoded(files: list[Path], size: int, *, grayscale: bool) -> Pixels:
    """Decode files in threads and return the (N, C, H, W) images."""
    images = np.empty((len(files), 1 if grayscale else 3, size, size), dtype=np.uint8)

    def read(file: Path) -> Pixels:
        return photograph(open_image(file), size, crop=True, grayscale=grayscale)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        rows = tqdm(
            pool.map(read, files, chunksize=16),
            total=len(files),
            unit="image",
            disable=len(files) < KEPT_FROM,
        )
        try:
            for row, pixels in enumerate(rows):
                images[row] = pixels
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return images


def _moments(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel in [0, 1] units."""
    total = torch.zeros(images.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for chunk in images.split(256):
        values = chunk.double() / 255.0
        total += values.sum(dim=(0, 2, 3))
        squares += (values**2).sum(dim=(0, 2, 3))
    count = images.numel() / images.shape[1]
    mean = total / count
    # Blank images have deviation 0: the bound avoids a division by zero.
    std = (squares / count - mean**2).clamp(min=0.0).sqrt().clamp(min=1.0 / 255.0)
    return tuple(mean.tolist()), tuple(std.tolist())


def _check_memory(num_images: int, size: int, channels: int) -> None:
    needed = num_images * channels * size * size
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.8 * memory:
        raise ValueError(
            f"{num_images} images of {size} x {size} take {needed / 1e9:.1f} GB, this machine has "
            f"{memory / 1e9:.1f} GB: lower data.image_size"
        )
