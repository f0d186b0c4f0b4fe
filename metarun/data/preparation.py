"""How single images become rows, as the images of a data set did.

Shapes: N images, C H W.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metarun.core.types import Record
from metarun.data.storage.cache import Pixels
from metarun.data.storage.image_files import Drawing, Photograph, picture

Convert = Callable[[Image.Image], Pixels]

_KINDS: dict[str, type[Drawing | Photograph]] = {"drawing": Drawing, "photograph": Photograph}
"""Conversions that can be recorded as plain values, by the name in the record."""


class Preparation:
    """Conversion of images to rows: one size, values in [0, 1], then normalization.

    Args:
        convert: Function that converts one PIL image to (C, H, W) uint8.
        mean, std: Mean and standard deviation of each channel, in [0, 1] units; None leaves
            pixels in [0, 1].
        device: Device of the rows.
        dtype: Precision of the rows.

    Attributes:
        device, dtype: As given.
    """

    def __init__(
        self,
        convert: Convert,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._convert = convert
        self._moments = (mean, std)
        self.device = device
        self.dtype = dtype
        self._white = torch.tensor(255.0, dtype=dtype, device=device)
        self._scale: Tensor | None = None
        self._offset: Tensor | None = None
        if mean is not None and std is not None:
            assert len(mean) == len(std)
            scale = torch.tensor(std, dtype=torch.float64).reciprocal()
            offset = -torch.tensor(mean, dtype=torch.float64) * scale
            self._scale = scale.to(device, dtype).reshape(-1, 1, 1)
            self._offset = offset.to(device, dtype).reshape(-1, 1, 1)

    @classmethod
    def of(cls, record: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Preparation:
        """Return the preparation that `record` describes; `ValueError` or `TypeError` if none."""
        options = dict(record)
        mean, std = options.pop("mean"), options.pop("std")
        kind = options.pop("kind")
        if kind not in _KINDS:
            raise ValueError(f"kind {kind!r} is none of {', '.join(_KINDS)}")
        return cls(_KINDS[kind](**options), mean, std, device, dtype)

    def record(self) -> Record | None:
        """Return this preparation as plain values; None if its conversion is not one of ours."""
        mean, std = (None if m is None else list(m) for m in self._moments)
        for name, kind in _KINDS.items():
            if type(self._convert) is kind:
                return {"kind": name, **asdict(self._convert), "mean": mean, "std": std}
        return None

    def rows(self, images: Any, shape: tuple[int, ...]) -> Tensor:
        """Convert a user's images to rows (N, C, H, W); see `ClassEpisodes.prepare`.

        Args:
            images: The images.
            shape: (C, H, W) of a row. An image of one channel is repeated for each of C.

        Raises:
            ValueError: An image cannot be read; the message names it.
        """
        if isinstance(images, Tensor) and images.is_floating_point():
            if tuple(images.shape[1:]) == shape:
                return images.to(self.device, self.dtype)
            raise ValueError(
                f"images have shape {tuple(images.shape)}, a tensor of prepared rows has "
                f"(N, {', '.join(map(str, shape))}): pass arrays, paths or PIL images instead"
            )
        if isinstance(images, str | Path | Image.Image):
            raise ValueError("one image was passed, a list is expected: put it in [brackets]")
        pixels = self._pixels(list(images))
        if not pixels:
            raise ValueError("no images were passed: give at least one")
        stacked = torch.from_numpy(np.stack(pixels)).to(self.device)
        return self.normalize(self.shares(stacked)).expand(-1, shape[0], -1, -1)

    @property
    def moments(self) -> tuple[Sequence[float], Sequence[float]] | None:
        """Mean and standard deviation of each channel by which images are normalized, if any."""
        mean, std = self._moments
        return None if mean is None or std is None else (mean, std)

    def shares(self, pixels: Tensor) -> Tensor:
        """Return uint8 pixels in [0, 1], the same bits on every device."""
        # By a tensor: CUDA multiplies by a number's reciprocal, one bit off for half of all levels.
        return pixels.to(self.dtype).div_(self._white)

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize images (…, C, H, W) in [0, 1]."""
        if self._scale is None or self._offset is None:
            return images
        return images * self._scale + self._offset

    def _pixels(self, images: list[Any]) -> list[Pixels]:
        """Convert images one by one. Files are read in threads; other objects may be shared."""

        def one(position: int, image: Any) -> Pixels:
            return self._convert(picture(image, position))

        if not all(isinstance(image, str | Path) for image in images):
            return list(map(one, itertools.count(), images))
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return list(pool.map(one, itertools.count(), images))
