"""Conversion of stored images to another size or number of channels.

Shapes: N images, C H W.
"""

from __future__ import annotations

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in a gray level, as in ITU-R 601 and Pillow."""
_TOGETHER = 1024


def converted(images: Tensor, channels: int, side: int) -> Tensor:
    """Return uint8 images (N, C, H, W) with other channels and side x side pixels.

    Gray levels are repeated for each color, and colors become gray levels. Images of the wanted
    shape are returned as they are.
    """
    if tuple(images.shape[1:]) == (channels, side, side):
        return images
    return torch.cat([_converted(some, channels, [side, side]) for some in images.split(_TOGETHER)])


def _converted(images: Tensor, channels: int, size: list[int]) -> Tensor:
    if images.shape[1] == 3 and channels == 1:
        weights = torch.tensor(LUMA)
        images = torch.einsum("nchw,c->nhw", images.float(), weights).round().byte()[:, None]
    elif images.shape[1] == 1 and channels == 3:
        images = images.expand(-1, 3, -1, -1)
    if list(images.shape[-2:]) == size:
        return images
    # Imported here, because it takes a second and few data sets are resized.
    from torchvision.transforms.v2 import functional

    resized: Tensor = functional.resize(images, size, antialias=True)
    return resized
