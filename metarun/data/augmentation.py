"""Random image augmentation of a whole batch, on its device.

The random parameters of an image are a hash of its task and row. An augmented episode is therefore
as reproducible as one without augmentation.

Shapes: T tasks, R rows, B = T R images, C H W images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from metarun.core import seeding
from metarun.core.checks import within

_SLOT_AFFINE, _SLOT_FLIP, _SLOT_COLOR, _SLOT_ELASTIC, _SLOT_VIEW, _SLOT_CROP = range(6)
_CONTROL_POINTS = 5
_LUMA = (0.299, 0.587, 0.114)

Padding = Literal["zeros", "reflection"]


@dataclass(frozen=True, slots=True)
class Augmentation:
    """Augmentation of training images; the defaults change nothing.

    Attributes:
        degrees: Largest rotation in degrees, in either direction.
        translate: Largest shift along each axis, as a fraction of the side.
        scale: Largest relative change of size: factors are drawn from 1 ± this number.
        shear: Largest shear angle in degrees, in either direction.
        elastic: Largest shift of the 5 x 5 control points of an elastic deformation, as a
            fraction of the side. Pixels between the points are interpolated smoothly, which
            resembles the variation between writers.
        crop: Random crop of the image's size after padding by this many pixels on each side.
        flip: Whether to mirror left and right with probability one half.
        color: Largest relative change of brightness, contrast and saturation.
        padding: Content outside the image: `zeros` (background), or `reflection` of the image;
            None is that of the source.
    """

    degrees: float = 0.0
    translate: float = 0.0
    scale: float = 0.0
    shear: float = 0.0
    elastic: float = 0.0
    crop: int = 0
    flip: bool = False
    color: float = 0.0
    padding: Padding | None = None

    def __post_init__(self) -> None:
        within("data.augmentation", "[0, 180]", degrees=self.degrees)
        within("data.augmentation", "[0, 1]", translate=self.translate)
        within("data.augmentation", "[0, 0.9]", scale=self.scale)
        within("data.augmentation", "[0, 60]", shear=self.shear)
        within("data.augmentation", "[0, 0.5]", elastic=self.elastic)
        within("data.augmentation", "[0, 64]", crop=self.crop)
        within("data.augmentation", "[0, 1]", color=self.color)

    def padded(self, padding: Padding) -> Augmentation:
        """Return this augmentation with content outside the image where none is chosen."""
        return replace(self, padding=self.padding or padding)

    @property
    def moves(self) -> bool:
        """Whether any geometric transformation other than the mirror is enabled."""
        return any((self.degrees, self.translate, self.scale, self.shear, self.elastic))

    def __call__(self, images: Tensor, keys: Tensor) -> Tensor:
        """Augment (T, R, C, H, W) images in [0, 1], given the (T,) keys of the tasks."""
        if self.moves:
            grid = self._affine(images, keys)
            if self.elastic:
                grid = grid + self._elastic(images, keys)
            images = warp(images.flatten(0, 1), grid, self.padding or "zeros").reshape(images.shape)
        if self.crop:
            images = self._cropped(images, keys)
        if self.flip:
            images = _flip(images, keys)
        if self.color:
            images = _color(images, keys, self.color)
        return images

    def _cropped(self, images: Tensor, keys: Tensor) -> Tensor:
        """Pad the images and cut one of their size out of each, at a random place."""
        rows = images.flatten(0, 1)
        mode = "reflect" if self.padding == "reflection" else "constant"
        padded = functional.pad(rows, [self.crop] * 4, mode=mode)
        shape = (images.shape[1], 2)
        y, x = seeding.integers(keys, _SLOT_CROP, 2 * self.crop + 1, shape).flatten(0, 1).T
        number, channel = (torch.arange(size, device=rows.device) for size in rows.shape[:2])
        down, across = (torch.arange(size, device=rows.device) for size in rows.shape[2:])
        cut = padded[
            number[:, None, None, None],
            channel[:, None, None],
            (y[:, None] + down)[:, None, :, None],
            (x[:, None] + across)[:, None, None, :],
        ]
        return cut.reshape(images.shape)

    def _affine(self, images: Tensor, keys: Tensor) -> Tensor:
        """Draw affine maps and return their (2, B, H, W) sampling positions, in [-1, 1]."""
        # float64: the last bit of a sine may depend on the batch, and rounding removes it.
        draw = seeding.uniform(
            keys, _SLOT_AFFINE, (images.shape[1], 5), low=-1.0, dtype=torch.float64
        ).flatten(0, 1)
        return self.places(draw, images)

    def places(self, draw: Tensor, images: Tensor) -> Tensor:
        """Return the (2, B, H, W) positions in [-1, 1] at which affine maps sample the images.

        Args:
            draw: (B, 5) float64 in [-1, 1]: fractions of the largest rotation, shear, change of
                size and two shifts.
            images: (…, H, W) images, which give the size and the dtype.
        """
        angle = draw[:, 0] * math.radians(self.degrees)
        slant = torch.tan(draw[:, 1] * math.radians(self.shear))
        zoom = 1.0 / (1.0 + draw[:, 2] * self.scale)
        cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        shift = 2.0 * self.translate
        to_x = torch.stack([cos, slant * cos - sin, draw[:, 3] * shift])
        to_y = torch.stack([sin, slant * sin + cos, draw[:, 4] * shift])
        return places_of(torch.stack([to_x, to_y]).to(images.dtype), images)

    def _elastic(self, images: Tensor, keys: Tensor) -> Tensor:
        """Draw elastic deformations and return their (2, B, H, W) shifts of the positions."""
        shape = (images.shape[1], 2, _CONTROL_POINTS, _CONTROL_POINTS)
        most = 2.0 * self.elastic
        shifts = seeding.uniform(keys, _SLOT_ELASTIC, shape, low=-most, high=most)
        smooth: Tensor = functional.interpolate(
            shifts.flatten(0, 1).to(images.dtype),
            size=images.shape[-2:],
            mode="bicubic",
            align_corners=True,
        )
        return smooth.movedim(1, 0)


def places_of(maps: Tensor, images: Tensor) -> Tensor:
    """Return the (2, B, H, W) positions in [-1, 1] at which affine maps sample images.

    Args:
        maps: (2, 3, B) coefficients a, b and c of a x + b y + c, for x and for y.
        images: (…, H, W) images, which give the size.
    """
    height, width = images.shape[-2:]
    # Stacking in front and moving the axis is several times faster than stacking behind.
    return torch.stack([_plane(coefficients, height, width) for coefficients in maps.unbind()])


NO_AUGMENTATION = Augmentation()


def warp(images: Tensor, grid: Tensor, padding: str) -> Tensor:
    """Sample (B, C, H, W) images at (2, B, H, W) positions in [-1, 1]."""
    moved: Tensor = functional.grid_sample(
        images, grid.movedim(0, -1), padding_mode=padding, align_corners=False
    )
    return moved


def view(images: Tensor, number: int) -> Tensor:
    """Return a view of (…, C, H, W) images for test-time augmentation, by one fixed affine map.

    Args:
        images: Images to transform, with 0 outside of them.
        number: Number of the view. 0 is the identity, and view 2k approximately inverts 2k - 1.
    """
    if number == 0:
        return images
    key = torch.tensor((number + 1) // 2, device=images.device)
    draw = seeding.uniform(key, _SLOT_VIEW, (1, 5), low=-1.0, dtype=torch.float64)
    most = Augmentation(degrees=12.0, translate=0.06, scale=0.12, shear=12.0)
    grid = most.places(draw if number % 2 else -draw, images)
    rows = images.flatten(0, -4)
    return warp(rows, grid.expand(-1, len(rows), -1, -1), "zeros").reshape(images.shape)


def _plane(coefficients: Tensor, height: int, width: int) -> Tensor:
    """Return the (B, H, W) values of a·x + b·y + c at the pixel centers, from (3, B) a, b, c.

    `affine_grid` is not used: it is a matrix product, whose rounding depends on the batch size.
    """
    a, b, c = coefficients[:, :, None, None].unbind()
    x = _centers(width, coefficients)[None, None, :]
    y = _centers(height, coefficients)[None, :, None]
    return a * x + (b * y + c)


def _centers(size: int, like: Tensor) -> Tensor:
    steps = torch.arange(size, dtype=like.dtype, device=like.device)
    return (2.0 * steps + 1.0) / size - 1.0


def _flip(images: Tensor, keys: Tensor) -> Tensor:
    heads = seeding.integers(keys, _SLOT_FLIP, 2, (images.shape[1],)).to(torch.bool)
    return torch.where(heads[:, :, None, None, None], images.flip(-1), images)


def _color(images: Tensor, keys: Tensor, strength: float) -> Tensor:
    """Scale brightness, then contrast about the mean and saturation about the gray image."""
    draw = seeding.uniform(
        keys, _SLOT_COLOR, (images.shape[1], 3), low=1.0 - strength, high=1.0 + strength
    ).to(images.dtype)
    brightness, contrast, saturation = draw[..., None, None, None].unbind(2)
    images = (images * brightness).clamp(0.0, 1.0)
    gray = _gray(images)
    # float64, because the order of a sum may depend on the batch.
    mean = gray.mean(dim=(-3, -2, -1), keepdim=True, dtype=torch.float64).to(images.dtype)
    images = (mean + contrast * (images - mean)).clamp(0.0, 1.0)
    if images.shape[2] == 3:
        gray = _gray(images)
        images = (gray + saturation * (images - gray)).clamp(0.0, 1.0)
    return images


def _gray(images: Tensor) -> Tensor:
    if images.shape[2] != 3:
        return images
    red, green, blue = images.unbind(2)
    return (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue).unsqueeze(2)
