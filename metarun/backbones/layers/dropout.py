"""Random masks as a function of the noise key of a forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metarun.core import seeding
from metarun.core.once import once_per_network


@once_per_network
def makes_noise(net: nn.Module) -> bool:
    """Return whether a network draws random masks in training."""
    rates = (getattr(module, "drop_rate", None) for module in net.modules())
    return any(isinstance(rate, int | float) and rate > 0.0 for rate in rates)


def drop_blocks(x: Tensor, noise: Tensor, slot: int, rate: float, block_size: int) -> Tensor:
    """Apply DropBlock (Ghiasi et al. 2018): set squares to zero and rescale the rest.

    Args:
        x: (N, C, H, W) activations.
        noise: Key of the forward pass, 0-dimensional int64.
        slot: Number of the layer, which separates the draws of the layers of a network.
        rate: Share of activations to drop, in [0, 1).
        block_size: Side of a square, at most the height and the width of `x`.
    """
    height, width = x.shape[-2:]
    side = min(block_size, height, width)
    valid = (height - side + 1) * (width - side + 1)
    seed_rate = rate * height * width / (side**2 * valid)
    draws = seeding.uniform(noise, slot, x.shape, dtype=torch.float32)
    rows = torch.arange(height, device=x.device)[:, None]
    columns = torch.arange(width, device=x.device)[None, :]
    inside = (rows <= height - side) & (columns <= width - side)
    corners = ((draws < seed_rate) & inside).to(x.dtype)
    dropped = nn.functional.max_pool2d(
        nn.functional.pad(corners, (side - 1, 0, side - 1, 0)), side, stride=1
    )
    mask = 1.0 - dropped
    return x * mask * (mask.numel() / mask.sum().clamp(min=1.0))
