"""Convolution, normalization and pooling of a block, in the cheapest order.

Shapes: N rows, C channels, H W height and width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.convolution import conv2d_for_double_backward
from metarun.backbones.layers.normalization import (
    BatchNorm,
    Pooling,
    many_rows,
    unchanged,
)

_IMAGE_CHANNELS = 4


def conv_and_norm(
    conv: nn.Module,
    norm: nn.Module,
    x: Tensor,
    ctx: ForwardContext,
    *,
    pool: Pooling | None = None,
) -> Tensor:
    """Convolve and normalize (N, C, H, W) images, optionally followed by max-pooling.

    Scaling and shifting a map commute with pooling up to a sign; after it they cost a quarter.
    The modules themselves are called only if they have forward hooks.

    Args:
        conv: Convolution with zero padding, one group and no dilation.
        norm: Normalization layer.
        x: (N, C, H, W) images.
        ctx: Options of the forward pass.
        pool: Max-pooling of (N, C, H, W) maps; None has none.
    """
    assert isinstance(conv, nn.Conv2d)
    pooled = pool or unchanged
    if not isinstance(norm, BatchNorm) or conv._forward_hooks or norm._forward_hooks:
        return pooled(norm(conv(x), ctx))
    double_backward = norm.native and ctx.double_backward and many_rows(x)
    convolve: Any = conv2d_for_double_backward if double_backward else nn.functional.conv2d
    if _has_small_patches(conv) and not ctx.running:
        return norm.of_patches(conv, x, ctx, pooled)
    if pool is None or norm.fuses(x, ctx):
        maps = convolve(x, conv.weight, conv.bias, conv.stride, conv.padding)
        return pooled(norm(maps, ctx))
    # max(s x + b) = |s| max(sign(s) x) + b. The signs are multiplied into the convolution's
    # weights, which is exact in floating point.
    sign = torch.where(norm.weight.detach() < 0, -1.0, 1.0).to(conv.weight.dtype)
    bias = None if conv.bias is None else conv.bias * sign
    weight = conv.weight * sign.view(-1, 1, 1, 1)
    maps = convolve(x, weight, bias, conv.stride, conv.padding)
    return norm.pooled(maps, ctx, sign, pool)


def _has_small_patches(conv: nn.Conv2d) -> bool:
    """Return whether a patch is of an image and has at most as many numbers as its output.

    Patches of feature maps would need derivatives, which cost more than `BatchNorm.of_patches`
    saves.
    """
    return conv.in_channels <= _IMAGE_CHANNELS and conv.weight.numel() <= conv.out_channels**2
