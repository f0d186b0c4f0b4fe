"""ResNet-12, the deep few-shot backbone (Oreshkin et al. 2018; widths of Lee et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from metarun.backbones.conv4 import check_image
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.conv_block import conv_and_norm
from metarun.backbones.layers.dropout import drop_blocks
from metarun.backbones.layers.normalization import BatchNorm
from metarun.backbones.network import Network
from metarun.core.checks import at_least, positive, within

_SLOPE = 0.1


class ResNet12(Network):
    """Four residual blocks of three 3x3 convolutions, each followed by 2x2 max-pooling.

    Follows the MetaOptNet code (kjunelee/MetaOptNet, models/ResNet12_embedding.py): leaky ReLU
    of slope 0.1, no convolution biases, DropBlock of side 5 in the last two blocks and plain
    dropout of activations in the first two. Masks are drawn only if the forward context has a
    noise key.

    Args:
        input_shape: (C, H, W).
        output_dim: Number of outputs of the head; None omits the head and returns the features.
        widths: Number of channels of each block.
        drop_rate: Share of activations to drop, in [0, 1).
        block_size: Side of DropBlock's squares.
        mean_pool: Whether to average over positions instead of flattening.
        norm_eps: Constant that batch norm adds to the variance: 1e-5 in torch, 1e-3 in TensorFlow.

    Raises:
        ValueError: The input is not an image or is too small, or a number is out of range.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        output_dim: int | None,
        *,
        widths: Sequence[int] = (64, 160, 320, 640),
        drop_rate: float = 0.1,
        block_size: int = 5,
        mean_pool: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        check_image(input_shape, len(widths), "resnet12")
        if not widths or min(widths) < 1:
            raise ValueError(f"backbone.widths={list(widths)}: expected positive widths")
        within("backbone", "[0, 1)", drop_rate=drop_rate)
        at_least("backbone", 1, block_size=block_size)
        positive("backbone", norm_eps=norm_eps)
        body = _Residual(input_shape[0], widths, drop_rate, block_size, mean_pool, norm_eps)
        super().__init__(body, input_shape, output_dim)


class _Residual(nn.Module):
    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        drop_rate: float,
        block_size: int,
        mean_pool: bool,
        norm_eps: float,
    ) -> None:
        super().__init__()
        before = [channels, *widths]
        self.blocks = nn.ModuleList(
            _Block(
                before[i], width, i, drop_rate, block_size if i >= len(widths) - 2 else 1, norm_eps
            )
            for i, width in enumerate(widths)
        )
        self.mean_pool = mean_pool
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(
                    module.weight, a=_SLOPE, mode="fan_out", nonlinearity="leaky_relu"
                )

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        for block in self.blocks:
            x = block(x, ctx)
        return x.mean((2, 3)) if self.mean_pool else x.flatten(1)


class _Block(nn.Module):
    def __init__(
        self,
        channels: int,
        width: int,
        index: int,
        drop_rate: float,
        block_size: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        ins = (channels, width, width)
        self.convs = nn.ModuleList(nn.Conv2d(c, width, 3, padding=1, bias=False) for c in ins)
        self.norms = nn.ModuleList(
            BatchNorm(width, f"blocks.{index}.{i}", norm_eps) for i in range(3)
        )
        self.shortcut = nn.Conv2d(channels, width, 1, bias=False)
        self.shortcut_norm = BatchNorm(width, f"blocks.{index}.shortcut", norm_eps)
        self.index = index
        self.drop_rate = drop_rate
        self.block_size = block_size

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        out = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            out = conv_and_norm(conv, norm, out, ctx)
            if i < 2:
                out = nn.functional.leaky_relu(out, _SLOPE)
        short = conv_and_norm(self.shortcut, self.shortcut_norm, x, ctx)
        out = nn.functional.leaky_relu(out + short, _SLOPE)
        out = nn.functional.max_pool2d(out, 2)
        if ctx.noise is None or self.drop_rate == 0.0:
            return out
        return drop_blocks(out, ctx.noise, self.index, self.drop_rate, self.block_size)
