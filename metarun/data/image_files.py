"""Data sets of images in files, which a subclass lists by class and split."""

from __future__ import annotations

import hashlib
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from metarun.core import memory
from metarun.core.checks import within
from metarun.core.once import warn_once
from metarun.core.types import SPLITS, EpisodeSize, SourceSetup, Split
from metarun.core.words import first_of
from metarun.data.augmentation import NO_AUGMENTATION, Augmentation
from metarun.data.episodes import ClassEpisodes, ClassTable
from metarun.data.storage.cache import Pixels
from metarun.data.storage.image_files import Photograph, open_image, size_of
from metarun.data.storage.prepared_images import KEPT_FROM, Prepared, prepared

Classes = dict[str, list[Path]]
"""Files of each class."""

_SMALLEST, _LARGEST = 28, 84
"""Bounds of `fitting_side` in pixels: the sides of Omniglot's and miniImageNet's images."""
_LOOKED_AT = 200
_NAMED = 5
"""Most images that a message names."""


class ImageFiles(ClassEpisodes, ABC):
    """Images in files below one folder. A subclass implements `list_images`.

    Images are cropped to the central square and normalized with the mean and standard deviation
    of the train split. Large sets are cached on disk after decoding (see `prepared`).

    Args:
        setup: See `ClassEpisodes`.
        root: Folder of the images.
        image_size: Side of the prepared images in pixels; None takes `fitting_side` of the files.
        skip_unreadable: Whether to go on without images that cannot be read.
        grayscale: Whether images have one channel instead of three.
        augmentation: Changes of training images.

    Raises:
        ValueError: There is no such folder, an image cannot be read, classes have too few images,
            or an option is out of range.
    """

    found_in_files: ClassVar[Sequence[str]] = ("image_size",)
    """Options that are worked out from the files where they are null."""

    file_names: dict[Split, list[str]]
    """Files of each split in the order of the rows, relative to the folder."""
    selection: Mapping[str, Any] = {}
    """Options of a subclass that select images. Each choice has its own cache."""

    def __init__(
        self,
        setup: SourceSetup,
        *,
        root: str | None = None,
        image_size: int | None = 84,
        skip_unreadable: bool = False,
        grayscale: bool = False,
        augmentation: Augmentation = NO_AUGMENTATION,
    ) -> None:
        within("data", "[8, 512]", image_size=image_size)
        folder = Path(root or "").expanduser()
        if root is None or not folder.is_dir():
            raise ValueError(f"data.root={root}: expected the folder of the images")
        splits = self.list_images(folder)
        alone = "val" not in splits
        splits = {split: splits.get(split, {}) for split in SPLITS}
        can_drop = "min_per_class" in self.selection

        def parts(found: dict[Split, Any]) -> dict[Split, Any]:
            return dict.fromkeys(SPLITS, found["train"]) if alone else found

        _check_numbers(parts(splits), setup.sizes, can_drop=can_drop)
        files = {split: [f for group in splits[split].values() for f in group] for split in SPLITS}
        number, channels = sum(map(len, files.values())), 1 if grayscale else 3
        self.resolved_options: dict[str, Any] = {}
        if image_size is None:
            image_size = fitting_side([file for split in SPLITS for file in files[split]])
            self.resolved_options["image_size"] = image_size
        memory.check_fits(
            number * channels * image_size**2,
            f"{number} images of {image_size} x {image_size}",
            "lower data.image_size",
        )
        convert = Photograph(image_size, crop=True, grayscale=grayscale)
        how = {"image_size": image_size, "grayscale": grayscale, **self.selection}
        if skip_unreadable:
            how["skip_unreadable"] = True
        pictures = prepared(files, folder, how, lambda: _read(files, convert, skip=skip_unreadable))
        if any(pictures.unreadable.values()):
            bad = [files[split][row] for split in SPLITS for row in pictures.unreadable[split]]
            warn_once(f"{root}: {_listed(bad, number)} and are left out")
            splits = {s: _without(splits[s], pictures.unreadable[s]) for s in SPLITS}
            _check_numbers(parts(splits), setup.sizes, can_drop=can_drop)
        self.file_names = parts(
            {
                split: [
                    os.path.relpath(f, folder) for group in splits[split].values() for f in group
                ]
                for split in SPLITS
            }
        )
        super().__init__(
            setup,
            name=f"folder {root}",
            tables=parts(
                {
                    split: ClassTable(
                        images=torch.from_numpy(pictures.images[split]),
                        names=tuple(splits[split]),
                        counts=tuple(map(len, splits[split].values())),
                        digest=pictures.digests[split],
                    )
                    for split in SPLITS
                }
            ),
            augmentation=augmentation.padded("reflection"),
            mean=pictures.mean,
            std=pictures.std,
            prepare=convert,
            can_drop=can_drop,
        )

    @abstractmethod
    def list_images(self, root: Path) -> dict[Split, Classes]:
        """Return the files of each class of each split, without reading them.

        The splits have different classes, or there is only `train`, and each split has its classes.
        The order of classes and files numbers them.

        Args:
            root: Existing folder that has the files.
        """


def fitting_side(files: Sequence[Path]) -> int:
    """Return the median of the shorter sides of images, in pixels, or the nearest of 28 to 84.

    It reads the sizes of at most 200 files, evenly spaced in their order.
    """
    sides: list[int] = []
    for file in files[:: max(1, len(files) // _LOOKED_AT)]:
        # An image that cannot be read is named when all are decoded.
        with suppress(ValueError):
            sides.append(min(size_of(file)))
    middle = sorted(sides)[len(sides) // 2] if sides else _LARGEST
    return min(_LARGEST, max(_SMALLEST, middle))


def _check_numbers(
    splits: Mapping[Split, Classes], sizes: Mapping[Split, EpisodeSize], *, can_drop: bool
) -> None:
    """Check that classes have enough images for a task, before any image is read.

    Raises:
        ValueError: Some have not; the message names the smallest and the values that would do.
    """
    # In the order of `sizes`: evaluation first, because users set its keys.
    numbers = [
        (len(files) - sizes[split].shot - sizes[split].query, split, name)
        for split in sizes
        for name, files in splits[split].items()
    ]
    rest, split, name = min(numbers, key=lambda entry: entry[0])
    if rest >= 0:
        return
    size, count = sizes[split], len(splits[split][name])
    needed = max(sizes[split].shot + sizes[split].query for rest, split, _ in numbers if rest < 0)
    dropped = sum(len(splits[split][name]) < needed for _, split, name in numbers)
    drop = ""
    # Dropping all classes is no way out.
    if can_drop and dropped < len(numbers):
        which = "it" if dropped == 1 else f"{dropped} of {len(numbers)} classes"
        drop = f" or set data.min_per_class={needed} to drop {which}"
    raise ValueError(
        f"class {name} has {count} images, {size.shot}+{size.query} are needed: "
        f"{_ways_out(splits, sizes)}{drop}"
    )


def _ways_out(splits: Mapping[Split, Classes], sizes: Mapping[Split, EpisodeSize]) -> str:
    """Return the values with which the smallest classes would do."""
    both = sizes["train"] == sizes["test"]
    groups: dict[str, tuple[Split, ...]] = {"": SPLITS if both else ("val", "test")}
    if not both:
        groups["train."] = ("train",)
    lower: list[str] = []
    for prefix, own in groups.items():
        fewest = min(len(files) for split in own for files in splits[split].values())
        size = sizes[own[-1]]
        if fewest >= size.shot + size.query:
            continue
        if fewest < 2:
            return "add images"
        if fewest <= size.shot:
            lower.append(f"{prefix}shot to {fewest - 1}")
        lower.append(f"{prefix}query to {max(fewest - size.shot, 1)}")
    return f"lower {' and '.join(lower)}"


def _read(files: Mapping[Split, list[Path]], convert: Photograph, *, skip: bool) -> Prepared:
    """Decode the images of all splits.

    Raises:
        ValueError: Images cannot be read and `skip` is false; the message names them.
    """
    decoded = {split: _decoded(files[split], convert) for split in SPLITS}
    bad = {split: decoded[split][1] for split in SPLITS}
    if any(bad.values()) and not skip:
        paths = [files[split][row] for split in SPLITS for row in bad[split]]
        first = next(why for split in SPLITS for why in bad[split].values())
        _refuse(paths, sum(map(len, files.values())), first)
    images = {
        split: np.delete(pixels, list(bad[split]), axis=0) if bad[split] else pixels
        for split, (pixels, _) in decoded.items()
    }
    if not len(images["train"]):
        raise ValueError("no image of the train split can be read: check the files")
    mean, std = _moments(torch.from_numpy(images["train"]))
    digests = {split: hashlib.sha256(pixels.data).hexdigest() for split, pixels in images.items()}
    return Prepared(images, digests, mean, std, {split: tuple(bad[split]) for split in SPLITS})


def check_readable(files: Sequence[Path]) -> None:
    """Read every image.

    Raises:
        ValueError: Some cannot be read; the message names them.
    """
    bad = unreadable(files)
    if bad:
        _refuse(list(bad), len(files), next(iter(bad.values())))


def unreadable(files: Sequence[Path]) -> dict[Path, str]:
    """Return the images that cannot be read, with what is wrong with each."""

    def why(file: Path) -> str | None:
        try:
            open_image(file)
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        reasons = list(pool.map(why, files))
    return {file: text for file, text in zip(files, reasons, strict=True) if text is not None}


def _refuse(paths: Sequence[Path], total: int, why: str) -> NoReturn:
    """Raise the error for images that cannot be read; `why` is what is wrong with the first."""
    one = len(paths) == 1
    text = why if one else f"{_listed(paths, total)}: replace or remove them"
    which = "it" if one else "them"
    raise ValueError(f"{text}, or set data.skip_unreadable=true to go on without {which}")


def _listed(paths: Sequence[Path], total: int) -> str:
    names = first_of([f"{path.parent.name}/{path.name}" for path in paths], _NAMED)
    return f"{len(paths):,} of {total:,} images cannot be read ({names})"


def _without(classes: Classes, rows: Sequence[int]) -> Classes:
    """Return the files of each class without those at some rows of all files in order."""
    left_out, row = set(rows), itertools.count()
    return {
        name: [f for f in files if next(row) not in left_out] for name, files in classes.items()
    }


def _decoded(files: list[Path], convert: Photograph) -> tuple[Pixels, dict[int, str]]:
    """Decode files in threads: (N, C, H, W) images, and what is wrong with a row, if anything."""
    side = convert.size
    images = np.zeros((len(files), 1 if convert.grayscale else 3, side, side), dtype=np.uint8)
    bad: dict[int, str] = {}

    def read(file: Path) -> Pixels | str:
        try:
            return convert(open_image(file))
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        rows = tqdm(
            pool.map(read, files, chunksize=16),
            total=len(files),
            unit="image",
            disable=len(files) < KEPT_FROM,
        )
        try:
            for row, pixels in enumerate(rows):
                if isinstance(pixels, str):
                    bad[row] = pixels
                else:
                    images[row] = pixels
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return images, bad


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
