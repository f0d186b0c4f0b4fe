"""WRN-28-10, the wide residual network (Zagoruyko & Komodakis 2016) of few-shot learning.

Parameters are named as in xternalz/WideResNet-pytorch, on which the code of S2M2 (Mangla et al.
2020) builds.
"""

from __future__ import annotations

from torch import Tensor, nn

from metarun.backbones.conv4 import check_image
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.conv_block import conv_and_norm
from metarun.backbones.layers.dropout import drop_blocks
from metarun.backbones.layers.normalization import BatchNorm
from metarun.backbones.network import Network
from metarun.core.checks import at_least, positive, within


class WRN28x10(Network):
    """Three groups of pre-activation blocks with 16, 32 and 64 channels times the width.

    Its depth is 6 `blocks` + 4. Features are averaged over positions.

    Args:
        input_shape: (C, H, W).
        output_dim: Number of outputs of the head; None omits the head and returns the features.
        width: Factor of the numbers of channels (k in the paper).
        blocks: Blocks of each group (N in the paper); the second and third group halve the image.
        drop_rate: Share of activations dropped between the convolutions of a block, in [0, 1).
        norm_eps: Constant that batch norm adds to the variance.

    Raises:
        ValueError: The input is not an image or is too small, or a number is out of range.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        output_dim: int | None,
        *,
        width: int = 10,
        blocks: int = 4,
        drop_rate: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        check_image(input_shape, 1, "wrn28_10")
        at_least("backbone", 1, width=width, blocks=blocks)
        within("backbone", "[0, 1)", drop_rate=drop_rate)
        positive("backbone", norm_eps=norm_eps)
        body = _Body(input_shape[0], width, blocks, drop_rate, norm_eps)
        super().__init__(body, input_shape, output_dim)


class _Body(nn.Module):
    def __init__(
        self, channels: int, width: int, blocks: int, drop_rate: float, eps: float
    ) -> None:
        super().__init__()
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        for group in range(3):
            layer = nn.ModuleList(
                _Block(
                    widths[group + (i > 0)],
                    widths[group + 1],
                    2 if group and not i else 1,
                    group * blocks + i,
                    drop_rate,
                    eps,
                )
                for i in range(blocks)
            )
            self.add_module(f"block{group + 1}", nn.ModuleDict({"layer": layer}))
        self.bn1 = BatchNorm(widths[-1], "bn1", eps)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x = nn.functional.conv2d(x, self.conv1.weight, padding=1)
        for group in ("block1", "block2", "block3"):
            for block in self.get_submodule(f"{group}.layer").children():
                x = block(x, ctx)
        normed: Tensor = self.bn1(x, ctx)
        return normed.relu().mean((2, 3))


class _Block(nn.Module):
    """x + conv2(drop(relu(bn2(conv1(relu(bn1(x))))))); where sizes differ, x is convolved, too.

    Args:
        ins, outs: Number of channels before and after.
        stride: Stride of the first convolution.
        index: Number of the block, which separates its random masks.
        drop_rate: Share of activations to drop.
        eps: Constant that batch norm adds to the variance.
    """

    def __init__(
        self, ins: int, outs: int, stride: int, index: int, drop_rate: float, eps: float
    ) -> None:
        super().__init__()
        self.bn1 = BatchNorm(ins, f"{index}.bn1", eps)
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.bn2 = BatchNorm(outs, f"{index}.bn2", eps)
        self.conv2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        self.convShortcut = None if ins == outs else nn.Conv2d(ins, outs, 1, stride, bias=False)
        self.index = index
        self.drop_rate = drop_rate

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        active = self.bn1(x, ctx).relu()
        out = conv_and_norm(self.conv1, self.bn2, active, ctx).relu()
        if ctx.noise is not None and self.drop_rate > 0.0:
            out = drop_blocks(out, ctx.noise, self.index, self.drop_rate, 1)
        short: Tensor = x if self.convShortcut is None else self.convShortcut(active)
        summed: Tensor = short + self.conv2(out)
        return summed
