"""Data sets of images in files, which a subclass lists by class and split."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from metarun.core import memory
from metarun.core.checks import within
from metarun.core.types import SPLITS, EpisodeSize, SourceSetup, Split
from metarun.data.augmentation import Augmentation
from metarun.data.episodes import ClassEpisodes, ClassTable
from metarun.data.storage.cache import Pixels
from metarun.data.storage.image_files import open_image, photograph
from metarun.data.storage.prepared_images import KEPT_FROM, Prepared, prepared

Classes = dict[str, list[Path]]
"""Files of each class."""


class ImageFiles(ClassEpisodes, ABC):
    """Images in files below one folder. A subclass implements `list_images`.

    Images are cropped to the central square and normalized with the mean and standard deviation
    of the train split. Large sets are cached on disk after decoding (see `prepared`).

    Args:
        setup: See `ClassEpisodes`.
        root: Folder of the images.
        image_size: Side of the prepared images in pixels.
        grayscale: Whether images have one channel instead of three.
        flip, color, affine_degrees, affine_translate, affine_scale, affine_shear: See
            `Augmentation`.

    Raises:
        ValueError: There is no such folder, an image cannot be read, classes have too few images,
            or an option is out of range.
    """

    selection: Mapping[str, Any] = {}
    """Options of a subclass that select images. Each choice has its own cache."""

    def __init__(
        self,
        setup: SourceSetup,
        *,
        root: str | None = None,
        image_size: int = 84,
        grayscale: bool = False,
        flip: bool = False,
        color: float = 0.0,
        affine_degrees: float = 0.0,
        affine_translate: float = 0.0,
        affine_scale: float = 0.0,
        affine_shear: float = 0.0,
    ) -> None:
        within("data", "[8, 512]", image_size=image_size)
        folder = Path(root or "").expanduser()
        if root is None or not folder.is_dir():
            raise ValueError(f"data.root={root}: expected the folder of the images")
        splits = self.list_images(folder)
        _check_numbers(splits, setup.sizes, can_drop="min_per_class" in self.selection)
        files = {split: [f for group in splits[split].values() for f in group] for split in SPLITS}
        number, channels = sum(map(len, files.values())), 1 if grayscale else 3
        memory.check_fits(
            number * channels * image_size**2,
            f"{number} images of {image_size} x {image_size}",
            "lower data.image_size",
        )
        pictures = prepared(
            files,
            folder,
            {"image_size": image_size, "grayscale": grayscale, **self.selection},
            lambda: _read(files, image_size, grayscale=grayscale),
        )
        super().__init__(
            setup,
            name=f"folder {root}",
            tables={
                split: ClassTable(
                    images=torch.from_numpy(pictures.images[split]),
                    names=tuple(splits[split]),
                    counts=tuple(map(len, splits[split].values())),
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
            can_drop="min_per_class" in self.selection,
        )

    @abstractmethod
    def list_images(self, root: Path) -> dict[Split, Classes]:
        """Return the files of each class of each split, without reading them.

        The splits have different classes. The order of classes and files numbers them.

        Args:
            root: Existing folder that has the files.
        """


def _check_numbers(
    splits: Mapping[Split, Classes], sizes: Mapping[Split, EpisodeSize], *, can_drop: bool
) -> None:
    """Check that classes have enough images for a task, before any image is read."""
    # In the order of `sizes`: evaluation first, because users set its keys.
    for split, size in sizes.items():
        needed = size.shot + size.query
        for name, files in splits[split].items():
            if len(files) >= needed:
                continue
            key = "train.query" if split == "train" else "query"
            rest = len(files) - size.shot
            lower = f"lower {key} to {rest}" if rest > 0 else "add images"
            drop = f" or set data.min_per_class={needed} to drop it" if can_drop else ""
            raise ValueError(
                f"class {name} has {len(files)} images, {size.shot}+{size.query} are needed: "
                f"{lower}{drop}"
            )


def _read(files: Mapping[Split, list[Path]], size: int, *, grayscale: bool) -> Prepared:
    """Decode the images of all splits.

    Raises:
        ValueError: An image cannot be read; the message names it.
    """
    images = {split: _decoded(files[split], size, grayscale=grayscale) for split in SPLITS}
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
