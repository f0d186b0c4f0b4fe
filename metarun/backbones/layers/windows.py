"""A 3x3 convolution of images and its 2x2 max-pooling, from the 4x4 windows of the images.

The map before pooling is four times as large as the result, and for a few channels of images it
takes longer to write and read than to compute. Here a window of 4x4 pixels gives four outputs, of
which the largest is kept, for a part of the windows at a time that fits into the caches. The
backward pass computes the outputs again.

Shapes: N images, C channels, H W height and width, K output channels, M = N * H/2 * W/2 windows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_OFFSETS = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Rows and columns at which a window has a patch of 3x3."""
_NUMBERS = 2**18
"""Outputs that are computed at a time, 1 MiB in float32."""


def windows_of(x: Tensor) -> Tensor:
    """Return the windows (M, 16 C) of padded images (N, C, H + 2, W + 2), H and W even."""
    height, width = x.shape[2] - 3, x.shape[3] - 3
    shifted = [x[:, :, i : i + height : 2, j : j + width : 2] for i in range(4) for j in range(4)]
    return torch.stack(shifted, 2).flatten(1, 2).flatten(2).mT.flatten(0, 1)


def patch_moments(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means (9 C,) of all 3x3 patches, and of their products (9 C, 9 C)."""
    channels = windows.shape[1] // 16
    first = windows.mean(0).view(channels, 4, 4)
    second = (windows.mT @ windows / len(windows)).view(channels, 4, 4, channels, 4, 4)
    firsts, seconds = [], []
    for i, j in _OFFSETS:
        rows, columns = slice(i, i + 3), slice(j, j + 3)
        firsts.append(first[:, rows, columns].flatten())
        seconds.append(second[:, rows, columns, :, rows, columns].flatten(3).flatten(0, 2))
    return torch.stack(firsts).mean(0), torch.stack(seconds).mean(0)


def pooled_products(windows: Tensor, kernel: Tensor) -> Tensor:
    """Return the largest of the four products (M, K) of a kernel with the patches of a window.

    Of equal products the gradient goes to the first one, as in torch's pooling.

    Args:
        windows: (M, 16 C), without gradients.
        kernel: (K, C, 3, 3).
    """
    # This order compares the upper two patches, the lower two, and then the larger ones.
    placed = [
        nn.functional.pad(kernel, (j, 1 - j, i, 1 - i)).flatten(1)
        for i, j in sorted(_OFFSETS, key=lambda offset: offset[1])
    ]
    found: Tensor = _PooledProducts.apply(windows, torch.cat(placed).mT)
    return found


def _compared(windows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return left and right outputs (m, 2 K), and the upper and lower ones (m, K) of the larger."""
    left, right = (windows @ weight).chunk(2, 1)
    upper, lower = torch.maximum(left, right).chunk(2, 1)
    return left, right, upper, lower


class _PooledProducts(torch.autograd.Function):
    @staticmethod
    def forward(windows: Tensor, weight: Tensor) -> Tensor:
        parts = windows.split(max(1, _NUMBERS // weight.shape[1]))
        return torch.cat([torch.maximum(*_compared(part, weight)[2:]) for part in parts])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        windows, weight = ctx.saved_tensors
        size = max(1, _NUMBERS // weight.shape[1])
        total = torch.zeros_like(weight)
        for part, own in zip(windows.split(size), grad.split(size), strict=True):
            left, right, upper, lower = _compared(part, weight)
            pulled = _divided(_divided(own, upper, lower), left, right)
            total = total + part.mT @ pulled
        return None, total


def _divided(grad: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Return the gradients of both arguments of a maximum, side by side."""
    # Vectorized, which masks of booleans are not.
    of_other = torch.ops.aten.threshold_backward(grad, other - one, 0)
    return torch.cat([grad - of_other, of_other], 1)
