"""Dense backbones, such as 40-40 for sinusoids and 256-128-64-64 with batch norm for Omniglot.

These two are the networks of Finn et al. 2017 (sections 5.1 and 5.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.modulation import task_context
from metarun.backbones.layers.normalization import BatchNorm
from metarun.backbones.network import Network
from metarun.core.checks import positive

Activation = Literal["relu", "tanh"]
Init = Literal["torch", "truncated_normal", "kaiming_normal"]


class MLP(Network):
    """Multi-layer perceptron; images are flattened.

    Args:
        input_shape: Shape of one input.
        output_dim: Number of outputs of the head; None omits the head and returns the last hidden
            layer.
        hidden: Widths of the hidden layers.
        activation: `relu` or `tanh`.
        batch_norm: Whether to normalize before each activation.
        norm_eps: Constant that batch norm adds to the variance: 1e-5 in torch, 1e-3 in TensorFlow.
        init: Initialization of the weights. `torch` draws U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
            `truncated_normal` has standard deviation 0.01, truncated at two of them, and biases
            0, as in the MAML code. `kaiming_normal` is N(0, 2 / fan_in) with biases 0, which
            preserves the scale of the inputs through many layers.
        context_dim: Size of `ForwardContext.context`, which is appended to every input; 0 for
            none.

    Raises:
        ValueError: A width is not positive, an option is unknown, or batch norm would cancel the
            context.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        output_dim: int | None,
        *,
        hidden: Sequence[int] = (40, 40),
        activation: Activation = "relu",
        batch_norm: bool = False,
        norm_eps: float = 1e-5,
        init: Init = "torch",
        context_dim: int = 0,
    ) -> None:
        if not hidden or min(hidden) < 1:
            raise ValueError(
                f"backbone.hidden={list(hidden)}: expected one or more positive widths"
            )
        positive("backbone", norm_eps=norm_eps)
        if batch_norm and context_dim:
            raise ValueError(
                "backbone.batch_norm=true cancels the context, which adds the same to every row: "
                "set backbone.batch_norm=false, or use backbone=conv4 on images"
            )
        norms = [
            BatchNorm(width, f"norms.{i}", norm_eps) for i, width in enumerate(hidden) if batch_norm
        ]
        body = _Dense(math.prod(input_shape), hidden, activation, norms, context_dim)
        super().__init__(body, input_shape, output_dim)
        if init != "torch":
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    if init == "kaiming_normal":
                        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                    else:
                        nn.init.trunc_normal_(module.weight, std=0.01, a=-0.02, b=0.02)
                    nn.init.zeros_(module.bias)


class Flat(Network):
    """Flattened inputs as features, for learners on raw pixels.

    Args:
        input_shape: Shape of one input.
        output_dim: Number of outputs of a linear head; None returns the flattened inputs.
    """

    def __init__(self, input_shape: tuple[int, ...], output_dim: int | None) -> None:
        super().__init__(_Flatten(), input_shape, output_dim)


class _Flatten(nn.Module):
    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:  # noqa: ARG002
        return x.flatten(1)


class _Dense(nn.Module):
    def __init__(
        self,
        input_dim: int,
        hidden: Sequence[int],
        activation: str,
        norms: Sequence[nn.Module],
        context_dim: int,
    ) -> None:
        super().__init__()
        self.context_dim = context_dim
        widths = [input_dim + context_dim, *hidden]
        self.linears = nn.ModuleList(
            nn.Linear(before, after) for before, after in zip(widths, hidden, strict=False)
        )
        self.norms = nn.ModuleList(norms)
        self.activation = torch.tanh if activation == "tanh" else torch.relu

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x = x.flatten(1)
        if self.context_dim:
            context = task_context(ctx, self.context_dim, x)
            x = torch.cat([x, context.expand(x.shape[0], -1)], 1)
        for i, linear in enumerate(self.linears):
            x = linear(x)
            if len(self.norms):
                x = self.norms[i](x, ctx)
            x = self.activation(x)
        return x
