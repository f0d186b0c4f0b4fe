"""Images as a network from elsewhere expects them: their size, channels and normalization.

A data set has normalized its images by its own moments. The layer undoes that and normalizes by
those of the network, which together is one scale and one shift of each channel.

Shapes: N images, C H W of the data set, C' H' W' of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from metarun.core.checks import within

Interpolation = Literal["bilinear", "bicubic"]
Moments = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel, or of all, in [0, 1] units."""


class ImageInput(nn.Module):
    """Resizes images, cuts out their center, repeats a single channel, and normalizes them.

    Resizing is two products with matrices, which `torch.vmap`, derivatives and ONNX support; the
    result is that of `interpolate(antialias=True)`. The numbers are no part of the state: they
    follow from the settings, and from the moments of the data at hand.

    Args:
        input_shape: (C, H, W) of the data set.
        size: Side of the network's images in pixels; None leaves the size as it is.
        crop: Share of each side that the center cut out has: images are resized to `size / crop`
            first.
        interpolation: How images are resized.
        channels: C', for images of one channel; None leaves the channels as they are.
        data: Moments by which the data set has normalized its images; None if it has not.
        own: Moments by which the network's images are normalized; None leaves them as they are.

    Attributes:
        shape: (C', H', W').

    Raises:
        ValueError: The inputs are no images, have other channels, or a number is out of range.
    """

    rows: Tensor | None
    columns: Tensor | None
    scale: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        size: int | None = None,
        crop: float = 1.0,
        interpolation: Interpolation = "bilinear",
        channels: int | None = None,
        data: Moments | None = None,
        own: Moments | None = None,
    ) -> None:
        super().__init__()
        within("backbone", "[1, 4096]", input_size=size)
        within("backbone", "(0, 1]", crop=crop)
        if len(input_shape) != 3 and (size, channels, own) != (None, None, None):
            raise ValueError(
                f"this backbone takes images, and this data set has inputs of shape {input_shape}: "
                "use backbone=mlp"
            )
        self.channels = None if channels in (None, input_shape[0]) else channels
        if self.channels is not None and input_shape[0] != 1:
            raise ValueError(
                f"this backbone takes images of {channels} channels, these have {input_shape[0]}"
            )
        self.shape = input_shape
        if size is not None:
            self.shape = (input_shape[0], size, size)
        if self.channels is not None:
            self.shape = (self.channels, *self.shape[1:])
        resized = self.shape[1:] != input_shape[1:] or (size is not None and crop < 1.0)
        for name, side in zip(("rows", "columns"), input_shape[1:], strict=False):
            matrix = _resizing(side, size, crop, interpolation) if resized and size else None
            self.register_buffer(name, matrix, persistent=False)
        scale, shift = (None, None) if own is None else _affine(data, own)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    @property
    def changes(self) -> bool:
        """Whether images are changed at all."""
        return (self.channels, self.scale) != (None, None) or self.rows is not None

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H', W')."""
        if self.rows is not None and self.columns is not None:
            x = self.rows @ x @ self.columns.mT
        if self.channels is not None:
            x = x.expand(-1, self.channels, -1, -1)
        if self.scale is not None and self.shift is not None:
            x = x * self.scale + self.shift
        return x


def _resizing(side: int, size: int, crop: float, interpolation: Interpolation) -> Tensor:
    """Return the (size, side) matrix that resizes a column of pixels and cuts out its center."""
    whole = max(size, round(size / crop))
    unit = torch.eye(side, dtype=torch.float64)[None, None]
    resized = nn.functional.interpolate(unit, (whole, side), mode=interpolation, antialias=True)
    first = round((whole - size) / 2)
    return resized[0, 0, first : first + size].float()


def _affine(data: Moments | None, own: Moments) -> tuple[Tensor, Tensor]:
    """Return the scale and shift (C', 1, 1) from the data's normalization to the network's."""
    mean, std = (torch.tensor(list(m), dtype=torch.float64) for m in data or ((0.0,), (1.0,)))
    own_mean, own_std = (torch.tensor(list(m), dtype=torch.float64) for m in own)
    scale, shift = std / own_std, (mean - own_mean) / own_std
    return scale.float().view(-1, 1, 1), shift.float().view(-1, 1, 1)
