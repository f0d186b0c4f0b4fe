"""A small vision transformer (Dosovitskiy et al. 2021) for small images.

Parameters are named as in torchvision's `VisionTransformer`. Attention and layer norm are plain
arithmetic, which `torch.vmap` and second derivatives support.

Shapes: N images, P patches, H heads, D features of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metarun.backbones.conv4 import check_image
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.dropout import drop_blocks
from metarun.backbones.layers.normalization import LayerNorm
from metarun.backbones.network import Network
from metarun.core.checks import at_least, within


class ViT(Network):
    """Patches, a class token with learned positions, and pre-norm encoder blocks.

    The features are those of the class token.

    Args:
        input_shape: (C, H, W); H and W are multiples of `patch`.
        output_dim: Number of outputs of the head; None omits the head and returns the features.
        patch: Side of a patch in pixels.
        width: Features of a patch, a multiple of `heads`.
        depth: Number of blocks.
        heads: Attention heads.
        hidden: Width of the hidden layer of each block.
        drop_rate: Share of activations dropped behind attention and behind the dense layers, in
            [0, 1).

    Raises:
        ValueError: The input is no image that divides into patches, or a number is out of range.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        output_dim: int | None,
        *,
        patch: int = 4,
        width: int = 128,
        depth: int = 6,
        heads: int = 4,
        hidden: int = 256,
        drop_rate: float = 0.0,
    ) -> None:
        check_image(input_shape, 0, "vit")
        at_least("backbone", 1, patch=patch, width=width, depth=depth, heads=heads, hidden=hidden)
        within("backbone", "[0, 1)", drop_rate=drop_rate)
        if width % heads:
            raise ValueError(
                f"backbone.width={width}: expected a multiple of backbone.heads={heads}"
            )
        channels, *sides = input_shape
        if any(side % patch for side in sides):
            raise ValueError(
                f"backbone.patch={patch} does not divide images of {sides[0]}x{sides[1]} pixels: "
                "choose one that does"
            )
        body = _Body(
            channels,
            [side // patch for side in sides],
            patch,
            width,
            depth,
            heads,
            hidden,
            drop_rate,
        )
        super().__init__(body, input_shape, output_dim)


class _Body(nn.Module):
    def __init__(
        self,
        channels: int,
        sides: list[int],
        patch: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.conv_proj = nn.Conv2d(channels, width, patch, patch)
        self.encoder = _Encoder(sides[0] * sides[1] + 1, width, depth, heads, hidden, drop_rate)
        nn.init.trunc_normal_(self.conv_proj.weight, std=(channels * patch**2) ** -0.5)
        nn.init.zeros_(self.conv_proj.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        patches = self.conv_proj(x).flatten(2).mT
        first = self.class_token.expand(len(x), -1, -1)
        encoded: Tensor = self.encoder(torch.cat([first, patches], 1), ctx)
        return encoded[:, 0]


class _Encoder(nn.Module):
    def __init__(
        self, rows: int, width: int, depth: int, heads: int, hidden: int, drop_rate: float
    ) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, rows, width).normal_(std=0.02))
        self.layers = nn.ModuleDict(
            {f"encoder_layer_{i}": _Block(i, width, heads, hidden, drop_rate) for i in range(depth)}
        )
        self.ln = LayerNorm(width)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x = x + self.pos_embedding
        for layer in self.layers.values():
            x = layer(x, ctx)
        normed: Tensor = self.ln(x)
        return normed


class _Block(nn.Module):
    """x + attention(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, index: int, width: int, heads: int, hidden: int, drop_rate: float) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.self_attention = _Attention(width, heads)
        self.ln_2 = LayerNorm(width)
        # The numbers of the layers in torchvision, which has activation and dropout between.
        self.mlp = nn.ModuleDict({"0": nn.Linear(width, hidden), "3": nn.Linear(hidden, width)})
        for layer in self.mlp.values():
            nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
            nn.init.normal_(layer.bias, std=1e-6)  # type: ignore[arg-type]
        self.index = index
        self.drop_rate = drop_rate

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x = x + self._dropped(self.self_attention(self.ln_1(x)), 2 * self.index, ctx)
        hidden = nn.functional.gelu(self.mlp["0"](self.ln_2(x)))
        return x + self._dropped(self.mlp["3"](hidden), 2 * self.index + 1, ctx)

    def _dropped(self, x: Tensor, slot: int, ctx: ForwardContext) -> Tensor:
        if ctx.noise is None or self.drop_rate == 0.0:
            return x
        # Squares of side 1 are single activations.
        return drop_blocks(x.unsqueeze(1), ctx.noise, slot, self.drop_rate, 1).squeeze(1)


class _Attention(nn.Module):
    """Multi-head self-attention with the parameters of `nn.MultiheadAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        mixed = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        # (N, P, 3 D) to three of (N, H, P, D / H).
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in mixed.chunk(3, 2)
        )
        scores = query @ key.mT * query.shape[-1] ** -0.5
        attended: Tensor = self.out_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        return attended
