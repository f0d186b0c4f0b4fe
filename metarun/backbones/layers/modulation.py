"""Layers that are modulated by the context parameters of a task."""

from __future__ import annotations

from torch import Tensor, nn

from metarun.backbones.layers.context import ForwardContext


class FiLM(nn.Module):
    """Feature-wise linear modulation (Perez et al. 2018) by the context of a task.

    Computes gamma * x + beta for each channel, where (gamma, beta) is a linear function of the
    context. It is initialized as in the code of CAVIA: weights U(-sqrt(3 / fan_in),
    sqrt(3 / fan_in)), biases as in torch.

    Args:
        context_dim: Size of the context.
        num_features: Number of channels C of (N, C, H, W) inputs.
    """

    def __init__(self, context_dim: int, num_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(context_dim, 2 * num_features)
        nn.init.kaiming_uniform_(self.linear.weight, nonlinearity="linear")

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """Scale and shift the channels of (N, C, H, W)."""
        context = task_context(ctx, self.linear.in_features, x)
        gamma, beta = self.linear(context).view(2, 1, -1, 1, 1)
        scaled: Tensor = gamma * x + beta
        return scaled


def task_context(ctx: ForwardContext, context_dim: int, like: Tensor) -> Tensor:
    """Return the (context_dim,) context of a pass, in the dtype of `like`; zeros by default."""
    return like.new_zeros(context_dim) if ctx.context is None else ctx.context.to(like.dtype)
