"""ResNet-18 (He et al. 2016) for images of any size; parameters are named as in torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from metarun.backbones.conv4 import check_image
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.conv_block import conv_and_norm
from metarun.backbones.layers.normalization import BatchNorm
from metarun.backbones.network import Network
from metarun.core.checks import positive

Stem = Literal["small", "imagenet"]


class ResNet18(Network):
    """A first convolution and four stages of two basic blocks, averaged over positions.

    The names and shapes of its parameters are those of `torchvision.models.resnet18`, so that
    weights made for that network fit (with `stem="imagenet"`).

    Args:
        input_shape: (C, H, W).
        output_dim: Number of outputs of the head; None omits the head and returns the features.
        stem: First layers: `imagenet` is a 7x7 convolution of stride 2 and 3x3 max-pooling of
            stride 2, `small` a 3x3 convolution of stride 1, as is usual for images of 32 pixels.
        widths: Number of channels of each stage; all but the first halve the image.
        norm_eps: Constant that batch norm adds to the variance.

    Raises:
        ValueError: The input is not an image or is too small, or a number is out of range.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        output_dim: int | None,
        *,
        stem: Stem = "small",
        widths: Sequence[int] = (64, 128, 256, 512),
        norm_eps: float = 1e-5,
    ) -> None:
        check_image(input_shape, 1, "resnet18")
        if len(widths) != 4 or min(widths) < 1:
            raise ValueError(f"backbone.widths={list(widths)}: expected four positive widths")
        positive("backbone", norm_eps=norm_eps)
        super().__init__(_Body(input_shape[0], stem, widths, norm_eps), input_shape, output_dim)


class _Body(nn.Module):
    def __init__(self, channels: int, stem: Stem, widths: Sequence[int], eps: float) -> None:
        super().__init__()
        side, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.pools = stem == "imagenet"
        self.conv1 = nn.Conv2d(channels, widths[0], side, stride, side // 2, bias=False)
        self.bn1 = BatchNorm(widths[0], "bn1", eps)
        before = [widths[0], *widths]
        for i, width in enumerate(widths):
            stage = nn.ModuleList(
                [
                    _Block(before[i], width, 2 if i else 1, f"layer{i + 1}.0", eps),
                    _Block(width, width, 1, f"layer{i + 1}.1", eps),
                ]
            )
            self.add_module(f"layer{i + 1}", stage)
        self.stages = tuple(f"layer{i + 1}" for i in range(len(widths)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x = conv_and_norm(self.conv1, self.bn1, x, ctx).relu()
        if self.pools:
            x = nn.functional.max_pool2d(x, 3, 2, 1)
        for name in self.stages:
            for block in self.get_submodule(name).children():
                x = block(x, ctx)
        return x.mean((2, 3))


class _Block(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + x); the shortcut is a convolution where sizes differ.

    Args:
        ins, outs: Number of channels before and after.
        stride: Stride of the first convolution.
        name: Unique name, for the statistics of batch norm.
        eps: Constant that batch norm adds to the variance.
    """

    def __init__(self, ins: int, outs: int, stride: int, name: str, eps: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.bn1 = BatchNorm(outs, f"{name}.bn1", eps)
        self.conv2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        self.bn2 = BatchNorm(outs, f"{name}.bn2", eps)
        self.downsample: nn.ModuleList | None = None
        if ins != outs or stride > 1:
            self.downsample = nn.ModuleList(
                [
                    nn.Conv2d(ins, outs, 1, stride, bias=False),
                    BatchNorm(outs, f"{name}.downsample", eps),
                ]
            )

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        out = conv_and_norm(self.conv1, self.bn1, x, ctx).relu()
        out = conv_and_norm(self.conv2, self.bn2, out, ctx)
        if self.downsample is not None:
            x = conv_and_norm(self.downsample[0], self.downsample[1], x, ctx)
        return (out + x).relu()
