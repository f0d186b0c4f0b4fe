"""A 3x3 convolution of images and its 2x2 max-pooling, from the 4x4 windows of the images.

The map before pooling is four times as large as the result, and for a few channels of images it
takes longer to write and read than to compute. Here a window of 4x4 pixels gives four outputs, of
which the largest is kept, for a part of the windows at a time that fits into the caches. Each
derivative computes the outputs again, to know which one was the largest.

Shapes: N images, C channels, H W height and width, K output channels, T tasks of `torch.vmap`,
M = N * H/2 * W/2 windows of P = 16 C values.
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

    It is differentiable to any order, with and without `torch.vmap`. Of equal products the gradient
    goes to the first one, as in torch's pooling.

    Args:
        windows: (M, P).
        kernel: (K, C, 3, 3).
    """
    # This order compares the upper two patches, the lower two, and then the larger ones.
    placed = [
        nn.functional.pad(kernel, (j, 1 - j, i, 1 - i)).flatten(1)
        for i, j in sorted(_OFFSETS, key=lambda offset: offset[1])
    ]
    found: Tensor = _Largest.apply(windows[None], torch.cat(placed).mT[None])
    return found[0]


class _OfTasks(torch.autograd.Function):
    """A function of tensors that each have a row for each task; the tasks of vmap are more rows."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *tensors: Tensor) -> Any:
        size = info.batch_size
        rows = [
            (tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0))
            for tensor, dim in zip(tensors, in_dims, strict=True)
        ]
        return cls.apply(*(row.flatten(0, 1) for row in rows)).unflatten(0, (size, -1)), 0


class _Largest(_OfTasks):
    """The largest products (T, M, K) of windows (T, M, P) with the patches' weights (T, P, 4 K)."""

    @staticmethod
    def forward(windows: Tensor, weight: Tensor) -> Tensor:
        found = []
        for own_windows, own in zip(windows, weight, strict=True):
            compared = (_compared(part, own) for part in own_windows.split(_part_size(own)))
            found.append(
                torch.cat([torch.maximum(upper, lower) for _, _, upper, lower in compared])
            )
        return torch.stack(found)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        windows, weight = ctx.saved_tensors
        return (
            _of_windows(grad, windows, weight, weight) if ctx.needs_input_grad[0] else None,
            _OfWeight.apply(grad, windows, weight) if ctx.needs_input_grad[1] else None,
        )


class _OfWeight(_OfTasks):
    """The weights' gradient (T, P, 4 K), linear in the gradient (T, M, K) of the products.

    Which product is the largest has no derivative.
    """

    @staticmethod
    def forward(grad: Tensor, windows: Tensor, weight: Tensor) -> Tensor:
        found = []
        for own_grad, own_windows, own in zip(grad, windows, weight, strict=True):
            size = _part_size(own)
            total = torch.zeros_like(own)
            for part, pulled in zip(own_windows.split(size), own_grad.split(size), strict=True):
                total = total + part.mT @ _divided(pulled, *_compared(part, own))
            found.append(total)
        return torch.stack(found)

    @staticmethod
    def backward(ctx: Any, values: Tensor) -> Any:
        grad, windows, weight = ctx.saved_tensors
        return (
            _Chosen.apply(windows, values, weight) if ctx.needs_input_grad[0] else None,
            _of_windows(grad, windows, weight, values) if ctx.needs_input_grad[1] else None,
            None,
        )


class _Chosen(_OfTasks):
    """The products (T, M, K) with values (T, P, 4 K), at the place of the largest with weights."""

    @staticmethod
    def forward(windows: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        found = []
        for own_windows, own_values, own in zip(windows, values, weight, strict=True):
            parts = own_windows.split(_part_size(own))
            found.append(
                torch.cat([_chosen(part @ own_values, *_compared(part, own)) for part in parts])
            )
        return torch.stack(found)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        windows, values, weight = ctx.saved_tensors
        return (
            _of_windows(grad, windows, weight, values) if ctx.needs_input_grad[0] else None,
            _OfWeight.apply(grad, windows, weight) if ctx.needs_input_grad[1] else None,
            None,
        )


def _part_size(weight: Tensor) -> int:
    """Return the number of windows whose products are computed at a time."""
    return max(1, _NUMBERS // weight.shape[1])


def _compared(windows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return left and right products, and the upper and lower ones of the larger."""
    left, right = (windows @ weight).chunk(2, -1)
    upper, lower = torch.maximum(left, right).chunk(2, -1)
    return left, right, upper, lower


# `threshold_backward` is vectorized, which masks of booleans are not.


def _chosen(products: Tensor, left: Tensor, right: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """Return the products (…, K) of (…, 4 K) that are at the place of the largest one."""
    for one, other in ((left, right), (upper, lower)):
        first, second = products.chunk(2, -1)
        products = first + torch.ops.aten.threshold_backward(second - first, other - one, 0)
    return products


def _divided(grad: Tensor, left: Tensor, right: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """Return the gradient (…, 4 K) of all products from that (…, K) of the largest."""
    for one, other in ((upper, lower), (left, right)):
        of_other = torch.ops.aten.threshold_backward(grad, other - one, 0)
        grad = torch.cat([grad - of_other, of_other], -1)
    return grad


def _of_windows(grad: Tensor, windows: Tensor, weight: Tensor, values: Tensor) -> Tensor:
    """Return the gradient (T, M, P) of windows, by ordinary operators: it is rarely asked for."""
    return _divided(grad, *_compared(windows.detach(), weight.detach())) @ values.mT
