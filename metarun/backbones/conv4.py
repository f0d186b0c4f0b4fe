"""Conv4: four blocks of 3x3 convolution, normalization, activation and downsampling by 2.

With max-pooling it is the backbone of Vinyals et al. 2016 and Snell et al. 2017. With stride-2
convolutions it is that of MAML's Omniglot experiments (Finn et al. 2017, section 5.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.conv_block import conv_and_norm
from metarun.backbones.layers.modulation import FiLM
from metarun.backbones.layers.normalization import (
    BatchNorm,
    InstanceNorm,
    Pooling,
    Unchanged,
    many_rows,
)
from metarun.backbones.layers.pooling import halved, halved_ceil
from metarun.backbones.network import Maps, Network
from metarun.core.checks import at_least, positive

Downsample = Literal["max_pool", "max_pool_ceil", "stride"]
Pool = Literal["flatten", "mean"]
Norm = Literal["batch", "instance", "none"]
Activation = Literal["relu", "leaky_relu"]
Init = Literal["torch", "xavier_uniform"]


class Conv4(Network):
    """A stack of convolution blocks for images of any size and number of channels.

    Args:
        input_shape: (C, H, W).
        output_dim: Number of outputs of the head; None omits the head and returns the features.
        filters: Number of channels of every block (the papers use 32 and 64), or one per block.
        blocks: Number of blocks.
        downsample: `max_pool` halves the image and rounds down, `max_pool_ceil` and `stride` round
            up. `max_pool_ceil` is TensorFlow's padding `same`, as in Reptile's code.
        strides: Stride of each block's convolution, which replaces the halving of every block.
            Javed & White (2019) use six blocks with strides 2, 1, 2, 1, 2, 2.
        padding: Padding of each convolution, in pixels.
        pool: `flatten` keeps every position; `mean` averages over positions, as MAML's code
            does on Omniglot.
        norm: `batch`, `instance` or `none`. With instance norm the output for an image does not
            depend on the other rows, as online learners require.
        norm_eps: Constant that the normalization adds to the variance: 1e-5 in torch, 1e-3 in
            TensorFlow.
        activation: `relu`, or `leaky_relu` of slope 0.01, as in the code of MAML++.
        init: Initialization of the weights. `torch` draws U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
            `xavier_uniform` draws U(-a, a) with a = sqrt(6 / (fan_in + fan_out)) and has biases 0
            (Glorot & Bengio 2010), as in the code of MAML++ and TensorFlow's layers.
        context_dim: Size of `ForwardContext.context`; 0 for none. A FiLM layer uses it to scale
            and shift the maps of the penultimate block, before the activation (Zintgraf et al.
            2019).
        maps: Feature maps to return, (N, C, H, W), in place of features: `last`, those of the last
            block; or `early`, for which only the first two blocks downsample, without padding
            (Sung et al. 2018). Set by the algorithm.

    Raises:
        ValueError: The input is not an image or is too small, or an option is invalid.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        output_dim: int | None,
        *,
        filters: int | Sequence[int] = 64,
        blocks: int = 4,
        downsample: Downsample = "max_pool",
        strides: Sequence[int] | None = None,
        padding: int = 1,
        pool: Pool = "flatten",
        norm: Norm = "batch",
        norm_eps: float = 1e-5,
        activation: Activation = "relu",
        init: Init = "torch",
        context_dim: int = 0,
        maps: Maps | None = None,
    ) -> None:
        early = maps == "early"
        halving = min(blocks, 2) if early else blocks
        pooled = halving if downsample != "stride" and strides is None else 0
        check_image(input_shape, pooled, "conv4")
        at_least("backbone", 0, padding=padding)
        steps = _strides(strides, blocks, halving if downsample == "stride" else 0)
        widths = [filters] * blocks if isinstance(filters, int) else list(filters)
        if min(widths, default=0) < 1 or blocks < 1:
            raise ValueError(
                f"backbone.filters={filters}, backbone.blocks={blocks}: expected 1 or more"
            )
        if len(widths) != blocks:
            raise ValueError(
                f"backbone.filters={filters} does not match backbone.blocks={blocks}: give one "
                "number for all blocks, or one for each"
            )
        positive("backbone", norm_eps=norm_eps)
        if early:
            _check_maps(input_shape, pool)
        paddings = [0 if early and i < halving else padding for i in range(blocks)]
        _check_size(input_shape, steps, paddings)
        channels = [input_shape[0], *widths]
        norms = [_norm(norm, width, f"norms.{i}", norm_eps) for i, width in enumerate(widths)]
        body = _Blocks(
            channels,
            steps,
            paddings,
            norms,
            num_pooled=pooled,
            ceil=downsample == "max_pool_ceil",
            mean=pool == "mean",
            leaky=activation == "leaky_relu",
            maps=maps is not None,
            context_dim=context_dim,
        )
        super().__init__(body, input_shape, output_dim)
        if init == "xavier_uniform":
            for layer in (*body.convs, *([] if self.head is None else [self.head])):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)


class _Blocks(nn.Module):
    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        paddings: Sequence[int],
        norms: Sequence[nn.Module],
        *,
        num_pooled: int,
        ceil: bool,
        mean: bool,
        leaky: bool,
        maps: bool,
        context_dim: int,
    ) -> None:
        super().__init__()
        blocks = len(channels) - 1
        # A bias before batch norm has no effect on the output, but the papers' networks have
        # one and adapt it. It is kept so that parameter counts agree.
        self.convs = nn.ModuleList(
            nn.Conv2d(
                channels[i],
                channels[i + 1],
                3,
                stride=strides[i],
                padding=paddings[i],
            )
            for i in range(blocks)
        )
        self.norms = nn.ModuleList(norms)
        self.film_block = max(blocks - 2, 0)
        self.film = FiLM(context_dim, channels[self.film_block + 1]) if context_dim else None
        self.num_pooled = num_pooled
        self.pool: Pooling = halved_ceil if ceil else halved
        self.mean = mean
        self.activation = nn.functional.leaky_relu if leaky else torch.relu
        self.maps = maps
        self.native = False

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x = self._laid_out(x)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            # Pooling before the activation gives the same result for a quarter of the work.
            pool = self.pool if i < self.num_pooled else None
            x = conv_and_norm(conv, norm, x, ctx, pool=pool)
            if self.film is not None and i == self.film_block:
                x = self.film(x, ctx)
            x = self.activation(x)
        if self.maps:
            return x
        return x.mean((2, 3)) if self.mean else x.flatten(1)

    def _laid_out(self, x: Tensor) -> Tensor:
        """Return images in the memory layout with vectorized pooling and batch norm on a CPU."""
        if not (self.native and many_rows(x) and x.device.type == "cpu"):
            return x
        if x.shape[1] > 1:
            return x.contiguous(memory_format=torch.channels_last)
        # One channel fits any layout. These strides select channels_last for the first maps.
        return x.reshape(len(x), *x.shape[2:], 1).permute(0, 3, 1, 2)


def _norm(kind: str, width: int, name: str, eps: float) -> nn.Module:
    if kind == "batch":
        return BatchNorm(width, name, eps)
    return InstanceNorm(width, eps) if kind == "instance" else Unchanged()


def _strides(strides: Sequence[int] | None, blocks: int, halving: int) -> list[int]:
    """Return the stride of each block; by default 2 for the first `halving` blocks, else 1."""
    if strides is None:
        return [2 if i < halving else 1 for i in range(blocks)]
    if len(strides) != blocks or min(strides) < 1:
        raise ValueError(
            f"backbone.strides={list(strides)}: expected {blocks} positive numbers, one for each "
            "of backbone.blocks"
        )
    return list(strides)


def _check_size(
    input_shape: tuple[int, ...], strides: Sequence[int], paddings: Sequence[int]
) -> None:
    """Raise `ValueError` for images that shrink to nothing in the convolutions."""
    size = min(input_shape[1:])
    for stride, padding in zip(strides, paddings, strict=True):
        size = (size + 2 * padding - 3) // stride + 1
        if size < 1:
            raise ValueError(
                f"backbone.padding={padding}: images of {input_shape[1]}x{input_shape[2]} pixels "
                "are too small for the convolutions: use larger ones, or backbone.padding=1"
            )


def _check_maps(input_shape: tuple[int, ...], pool: str) -> None:
    if pool == "mean":
        raise ValueError("backbone.pool=mean leaves no feature maps: use backbone.pool=flatten")
    if min(input_shape[1:]) < 10:
        raise ValueError(
            f"backbone=conv4 cannot make feature maps of images of {input_shape[1]}x"
            f"{input_shape[2]}: use images of 10 pixels or more a side"
        )


def check_image(input_shape: tuple[int, ...], halvings: int, name: str) -> None:
    """Check that inputs are images that can be halved `halvings` times.

    Raises:
        ValueError: The inputs are not images, or are too small.
    """
    if len(input_shape) != 3:
        raise ValueError(
            f"backbone={name} needs images, this data set has inputs of shape {input_shape}: "
            "use backbone=mlp"
        )
    side = min(input_shape[1:])
    if side >> halvings < 1:
        raise ValueError(
            f"backbone={name} halves images {halvings} times, these are {input_shape[1]}x"
            f"{input_shape[2]}: use images of {2**halvings} pixels or more a side, or backbone=mlp"
        )
