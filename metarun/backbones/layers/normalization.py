"""Batch, instance and layer norm that are correct under `torch.vmap` and double differentiation.

Shapes: N rows, C channels, H W height and width.

`nn.BatchNorm2d` gives silently wrong second-order gradients under vmap when its weight is
adapted in the inner loop, and it updates statistics as a side effect. Batch norm is therefore
written as plain arithmetic here. The source of its statistics is an option of the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.pooling import halved
from metarun.backbones.layers.windows import patch_moments, pooled_products, windows_of

Pooling = Callable[[Tensor], Tensor]


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe & Szegedy 2015) with statistics chosen by the forward context.

    It is exact to any order of differentiation, with and without `torch.vmap`. With `native` set,
    it uses torch's fused operator where possible, which is several times faster and correct only
    outside vmap.

    Args:
        num_features: Number of channels C of (N, C) or (N, C, H, W) inputs.
        name: Name that is unique in its network, the key in `ForwardContext.moments`.
        eps: Constant added to the variance.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, name: str, eps: float = 1e-5) -> None:
        super().__init__()
        self.name = name
        self.eps = eps
        self.native = False
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Normalize (N, C) or (N, C, H, W) inputs."""
        if self.fuses(x, ctx):
            return self._fused(x, ctx)
        return self._normalized(x, ctx, None, unchanged)

    def pooled(self, x: Tensor, ctx: ForwardContext, sign: Tensor, pool: Pooling) -> Tensor:
        """Max-pool images, then normalize; equal to normalizing before pooling.

        Args:
            x: (N, C, H, W) maps, each channel multiplied by its sign.
            ctx: Options of the forward pass.
            sign: (C,) sign of each channel's weight, 1 or -1.
            pool: Max-pooling of (N, C, H, W) maps.
        """
        return self._normalized(x, ctx, sign, pool)

    def fuses(self, x: Tensor, ctx: ForwardContext) -> bool:
        """Return whether a pass uses torch's fused operator.

        The operator always takes the statistics of all rows. Its second derivatives cost twice
        those of plain arithmetic (measured at 25 rows of 84x84).
        """
        plain = ctx.double_backward or ctx.running or ctx.rows is not None
        return self.native and many_rows(x) and not plain

    def next_momentum(self) -> float:
        """Return the weight of an update's moments in the running statistics, as in torch."""
        return 0.1

    def of_patches(self, conv: nn.Conv2d, x: Tensor, ctx: ForwardContext, pool: Pooling) -> Tensor:
        """Convolve, normalize and pool images without statistics of the convolution's output.

        The statistics of w p + b over all patches p follow from those of the patches: its mean is
        w E[p] + b, its variance w Cov[p] w'. If the images are data, no derivative passes through
        the statistics of the patches.

        Args:
            conv: Convolution whose outputs are normalized.
            x: (N, C, H, W) inputs of the convolution.
            ctx: Options of the forward pass, without running statistics.
            pool: Max-pooling of (N, K, H', W') maps, or `unchanged`.
        """
        # Mixed precision: sums are taken in float32, as in torch's own operator.
        wide = x.to(self.running_mean.dtype)
        seen = wide if ctx.rows is None else wide[: ctx.rows]
        # Centering each channel first avoids cancellation in the variance.
        level = seen.mean((0, 2, 3))
        # Patches of color images are as large as the maps, and backward would keep them.
        as_maps = self.native and many_rows(x) and conv.in_channels > 1
        in_windows = _in_windows(conv, x, pool) and not (as_maps and ctx.double_backward)
        patches, sides = _patches(wide, level, conv, in_windows=in_windows)
        rows = conv.weight.to(wide.dtype).flatten(1)
        taken = rows @ level.repeat_interleave(rows.shape[1] // len(level))
        bias = 0.0 if conv.bias is None else conv.bias.to(wide.dtype)
        taken_of = patches[: len(seen) * sides[0] * sides[1]]
        center, products = patch_moments(taken_of) if in_windows else _moments(taken_of)
        spread = products - center * center[:, None]
        count = len(taken_of) * (4 if in_windows else 1)
        mean = rows @ center + taken + bias
        # Rounding errors can make it negative.
        var = ((rows @ spread) * rows).sum(1).clamp(min=0.0)
        if ctx.moments is not None:
            ctx.moments[self.name] = (mean.detach(), _stored(var.detach(), count, ctx))
        scale = self.weight * torch.rsqrt(var + self.eps)
        weight = (rows * scale[:, None]).to(x.dtype)
        if in_windows:
            kernel = weight.view_as(conv.weight)
            maps = pooled_products(patches.to(x.dtype), kernel).view(len(x), *sides, -1)
            maps, pool = maps.movedim(3, 1), unchanged
        elif as_maps:
            kernel = weight.view_as(conv.weight)
            maps = nn.functional.conv2d(x, kernel, None, conv.stride, conv.padding)
            taken = torch.zeros_like(taken)
        else:
            maps = (patches.to(x.dtype) @ weight.mT).view(len(x), *sides, -1).movedim(3, 1)
        shift = (self.bias + (taken + bias - mean) * scale).to(x.dtype)
        return pool(maps) + as_channels(shift, maps)

    def _normalized(
        self,
        x: Tensor,
        ctx: ForwardContext,
        sign: Tensor | None,
        thin: Pooling,
    ) -> Tensor:
        # Mixed precision: sums are taken in float32, as in torch's own operator.
        wide = x.to(self.running_mean.dtype)
        mean, var, centered = self._statistics(wide, ctx, sign)
        left = thin(wide) + as_channels(-mean, x) if centered is None else thin(centered)
        scale = _signed(self.weight, sign) * torch.rsqrt(var + self.eps)
        return torch.addcmul(as_channels(self.bias, x), left, as_channels(scale, x)).to(x.dtype)

    def _fused(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        out, mean, inverse_std = torch.native_batch_norm(
            x, self.weight, self.bias, None, None, True, 0.0, self.eps
        )
        if ctx.moments is not None:
            var = inverse_std.detach() ** -2 - self.eps
            ctx.moments[self.name] = (mean.detach(), _stored(var, _count(x), ctx))
        return out

    def _statistics(
        self, x: Tensor, ctx: ForwardContext, sign: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the (C,) mean and variance of an input, and the centered input or None.

        With `sign`, `x` is an input whose channels were multiplied by their signs.
        """
        if ctx.running:
            return _signed(self.running_mean, sign), self.running_var, None
        seen = x if ctx.rows is None else x[: ctx.rows]
        # Written so that derivatives divide and negate vectors of size C, not whole activations.
        share = seen.shape[1] / seen.numel()
        dims = _all_but_channels(x)
        mean = seen.sum(dims) * share
        centered = seen + as_channels(-mean, x)
        var = (centered * centered).sum(dims) * share
        if ctx.moments is not None:
            kept = _signed(mean.detach(), sign)
            ctx.moments[self.name] = (kept, _stored(var.detach(), _count(seen), ctx))
        return mean, var, centered if ctx.rows is None else None


def _signed(vector: Tensor, sign: Tensor | None) -> Tensor:
    return vector if sign is None else vector * sign.to(vector.dtype)


def _all_but_channels(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def as_channels(vector: Tensor, x: Tensor) -> Tensor:
    """Reshape (C,) to (1, C) or (1, C, 1, 1), to broadcast with `x`."""
    return vector.view((1, -1) + (1,) * (x.dim() - 2))


class InstanceNorm(nn.Module):
    """Instance normalization (Ulyanov et al. 2016): each map of each row has its own statistics.

    It equals batch norm of a batch of one image, which is all that an online learner has.

    Args:
        num_features: Number of channels C of (N, C, H, W) inputs.
        eps: Constant added to the variance.
    """

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:  # noqa: ARG002
        """Normalize (N, C, H, W) inputs."""
        # Mixed precision: sums are taken in float32, as in batch norm.
        wide = x.to(self.weight.dtype)
        centered = wide - wide.mean((2, 3), keepdim=True)
        scale = torch.rsqrt(centered.square().mean((2, 3), keepdim=True) + self.eps)
        scaled = centered * scale * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        return scaled.to(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalization (Ba et al. 2016) over the last dimension, as plain arithmetic.

    Under `torch.vmap`, second derivatives of `nn.LayerNorm` are wrong.

    Args:
        num_features: Size D of the last dimension.
        eps: Constant added to the variance; 1e-6 in vision transformers.
    """

    def __init__(self, num_features: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (…, D) inputs."""
        # Mixed precision: sums are taken in float32, as in batch norm.
        wide = x.to(self.weight.dtype)
        centered = wide - wide.mean(-1, keepdim=True)
        scale = torch.rsqrt(centered.square().mean(-1, keepdim=True) + self.eps)
        return (centered * scale * self.weight + self.bias).to(x.dtype)


class Unchanged(nn.Module):
    """Identity in place of a normalization layer."""

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:  # noqa: ARG002
        """Return the input."""
        return x


def _stored(var: Tensor, count: int, ctx: ForwardContext) -> Tensor:
    """Return the variance for `ctx.moments`: the unbiased one, unless `ctx.biased`."""
    return var if ctx.biased else var * (count / max(count - 1, 1))


def _count(x: Tensor) -> int:
    """Return the number of values per channel."""
    return x.numel() // x.shape[1]


def _in_windows(conv: nn.Conv2d, x: Tensor, pool: Pooling) -> bool:
    """Return whether `pooled_products` computes a convolution and its pooling."""
    shape = conv.kernel_size, conv.stride, conv.padding
    return (
        pool is halved
        and shape == ((3, 3), (1, 1), (1, 1))
        and x.shape[2] % 2 == x.shape[3] % 2 == 0
        and x.device.type == "cpu"
        and not x.requires_grad
    )


def _moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means (P,) of patches, and of their products (P, P)."""
    return patches.mean(0), patches.mT @ patches / len(patches)


def _patches(
    x: Tensor, level: Tensor, conv: nn.Conv2d, *, in_windows: bool
) -> tuple[Tensor, tuple[int, int]]:
    """Return the patches that a convolution reads from images, minus a level per channel.

    Args:
        x: (N, C, H, W) images.
        level: (C,) level to subtract from each channel.
        conv: Convolution that defines the patches.
        in_windows: Whether to return `windows_of` the images.

    Returns:
        (N * H' * W', P) values of each patch, and the size (H', W') of the output maps.
    """
    (height, width), (down, right) = conv.kernel_size, conv.stride
    assert not isinstance(conv.padding, str)
    above, left = conv.padding
    padded = nn.functional.pad(x, (left, left, above, above)) - as_channels(level, x)
    # Shifted images, because strided windows have no derivative under vmap.
    padded = padded.contiguous()
    if in_windows:
        return windows_of(padded), (x.shape[2] // 2, x.shape[3] // 2)
    rows, columns = padded.shape[2] - height + 1, padded.shape[3] - width + 1
    shifted = [
        padded[:, :, i : i + rows : down, j : j + columns : right]
        for i in range(height)
        for j in range(width)
    ]
    patches = torch.stack(shifted, 2).flatten(1, 2).flatten(2).mT.flatten(0, 1)
    return patches, (shifted[0].shape[2], shifted[0].shape[3])


def unchanged(x: Tensor) -> Tensor:
    """Return the input."""
    return x


def many_rows(x: Tensor) -> bool:
    """Return whether a batch is large enough for fused operators to be faster.

    The threshold was measured at 5 and 75 rows of 28x28.
    """
    return x.shape[0] >= 16


def set_native(net: nn.Module) -> None:
    """Allow the layers of a network to use operators and layouts that vmap does not support."""
    for module in net.modules():
        if hasattr(module, "native"):
            module.native = True  # type: ignore[assignment]


def move_running_statistics(
    net: nn.Module, moments: dict[str, tuple[Tensor, Tensor]], momentum: float | None = None
) -> None:
    """Move running statistics towards the moments of one pass, without a task dimension.

    Args:
        net: Network whose statistics are updated in place.
        moments: Mean and variance of each batch norm, as collected by `ForwardContext.moments`.
        momentum: Weight of the new moments; None takes that of each layer.
    """
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, BatchNorm) and module.name in moments:
                mean, var = moments[module.name]
                weight = module.next_momentum() if momentum is None else momentum
                module.running_mean.lerp_(mean, weight)
                module.running_var.lerp_(var, weight)


def batch_norms(net: nn.Module) -> list[tuple[str, BatchNorm]]:
    """Return the qualified name and the module of every batch norm of a network."""
    return [(name, norm) for name, norm in net.named_modules() if isinstance(norm, BatchNorm)]


def has_batch_norm(net: nn.Module) -> bool:
    """Return whether a network has batch norm, so that outputs may depend on other rows."""
    return any(isinstance(module, BatchNorm) for module in net.modules())


def norm_parameters(net: nn.Module) -> set[str]:
    """Return the qualified names of the scale and shift of every normalization layer of ours."""
    return {
        f"{name}.{own}"
        for name, module in net.named_modules()
        if isinstance(module, BatchNorm | InstanceNorm | LayerNorm)
        for own, _ in module.named_parameters()
    }
