"""What a learner offers to an adversary that makes rows for its tasks (MetaGAN).

Shapes: S support rows, R rows, W ways, C H W' of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from metarun.algorithms.functional import Params
from metarun.algorithms.outer_optimizer import OuterOptimizer
from metarun.backbones.layers.context import ForwardContext
from metarun.core.types import Progress

Answer = Callable[[Tensor, ForwardContext], Tensor]
"""Logits (R, W) of any rows (R, C, H, W') of a task that a learner has solved."""

SupportTerm = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
"""What is added to the loss of the support: of its logits (S, W), and of a function that gives
the logits (R, W) of other rows by the same weights."""


@runtime_checkable
class AdversarialLearner(Protocol):
    """A learner that an adversary can be put beside.

    Attributes:
        optimizer: Of what is meta-learned.
    """

    optimizer: OuterOptimizer

    def solve(
        self,
        net: nn.Module,
        params: Params,
        support_x: Tensor,
        support_y: Tensor,
        noise: Tensor,
        progress: Progress,
        term: SupportTerm | None,
    ) -> Answer:
        """Solve one training task, differentiable with respect to the parameters.

        Args:
            net: The network, or its replica.
            params: What is meta-learned, by the names of the optimizer.
            support_x: (S, C, H, W').
            support_y: (S,) labels.
            noise: Key of the random masks of the forward pass.
            progress: Where training stands.
            term: Added to the inner loss, where there is an inner loss.

        Returns:
            What answers any rows of the task.
        """
        ...

    def limited(self, grads: Params) -> Params:
        """Gradients by the names of the optimizer, as they go to it."""
        ...
