"""Base class of the backbones: a body that computes features and an optional linear head.

Parameter names begin with `body.` or `head.`. Algorithms such as ANIL select parameters by these
prefixes.

Shapes: N rows, F features.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.backbones.layers.context import BATCH_STATISTICS, ForwardContext
from metarun.backbones.layers.normalization import norm_parameters

Maps = Literal["early", "last"]
"""Feature maps that a backbone can return; see `Conv4`."""


class Network(nn.Module):
    """Body with an optional linear head.

    Args:
        body: Module that maps (N, *input_shape) and a `ForwardContext` to (N, F) features.
        input_shape: Shape of one input.
        output_dim: Number of outputs of the linear head; None omits the head.
        front: Module without parameters through which inputs pass before the body; None has none.
    """

    def __init__(
        self,
        body: nn.Module,
        input_shape: tuple[int, ...],
        output_dim: int | None,
        front: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.front = front
        self.body = body
        self.mixed = False
        inner = input_shape if front is None else output_shape(front, input_shape)
        self.feature_dim = output_shape(body, inner, BATCH_STATISTICS)[0]
        self.head = None if output_dim is None else nn.Linear(self.feature_dim, output_dim)

    def forward(self, x: Tensor, ctx: ForwardContext = BATCH_STATISTICS) -> Tensor:
        """Map (N, *input_shape) to (N, output_dim), or to (N, F) without a head."""
        if self.mixed:
            return self._mixed_answers(x if self.front is None else self.front(x), ctx)
        features = self.features(x, ctx)
        answers: Tensor = features if self.head is None else self.head(features)
        return answers

    def features(self, x: Tensor, ctx: ForwardContext = BATCH_STATISTICS) -> Tensor:
        """Map (N, *input_shape) to (N, F)."""
        found: Tensor = self.body(x if self.front is None else self.front(x), ctx)
        return found

    def _mixed_answers(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        # The casts are explicit because torch.autocast skips most operators under vmap.
        kept = norm_parameters(self.body)
        halved = {
            name: p if name in kept else p.bfloat16() for name, p in self.body.named_parameters()
        }
        features: Tensor = torch.func.functional_call(self.body, halved, (x.bfloat16(), ctx))
        if self.head is None:
            return features.float()
        weight, bias = self.head.weight.bfloat16(), self.head.bias.bfloat16()
        return nn.functional.linear(features, weight, bias).float()


def set_mixed(module: nn.Module) -> int:
    """Make networks compute in bfloat16; parameters, gradients and outputs stay float32.

    Batch norm keeps its sums, its scale and its shift in float32, too.

    Args:
        module: Module that contains the networks.

    Returns:
        Number of networks found in `module`.
    """
    found = [part for part in module.modules() if isinstance(part, Network)]
    for network in found:
        network.mixed = True
    return len(found)


def output_shape(
    body: nn.Module, input_shape: tuple[int, ...], *context: ForwardContext
) -> tuple[int, ...]:
    """Return the shape of a module's output for one input, by a pass in evaluation mode.

    Args:
        body: Module that maps a batch of inputs to a batch of outputs.
        input_shape: Shape of one input.
        context: Context of the pass, for a module that takes one.

    Raises:
        ValueError: The module does not return a tensor with one row for each input.
    """
    body.eval()
    with torch.no_grad():
        outputs: Any = body(torch.zeros(2, *input_shape), *context)
    body.train()
    if not isinstance(outputs, Tensor) or outputs.dim() < 2 or len(outputs) != 2:
        found = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"its output for 2 inputs is {found}: expected a tensor with 2 rows")
    return tuple(outputs.shape[1:])
