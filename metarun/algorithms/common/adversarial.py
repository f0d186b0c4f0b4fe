"""The interface between a learner and an adversary that generates rows for tasks (MetaGAN).

Shapes: S support rows, R rows, W ways, C H W' channels, height and width of an image.
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
"""Function from rows (R, C, H, W') to logits (R, W), after adaptation to one task."""

SupportTerm = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
"""Function that returns a term of the inner loss.

Its arguments are the support logits (S, W) and a function that returns the logits (R, W) of other
rows with the same weights."""


@runtime_checkable
class AdversarialLearner(Protocol):
    """A learner that can be trained against an adversary.

    Attributes:
        optimizer: Outer optimizer of all meta-learned parameters.
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
        """Adapt to one training task, differentiably with respect to the parameters.

        Args:
            net: The network, or its replica.
            params: Meta-learned parameters, by their names in the optimizer.
            support_x: Support images, (S, C, H, W').
            support_y: Support labels, (S,).
            noise: Key of the random masks of the forward pass.
            progress: Number of updates done, and of all updates.
            term: Additional term of the inner loss, for learners that have an inner loss.

        Returns:
            Function that returns the logits of any rows of the task.
        """
        ...

    def limited(self, grads: Params) -> Params:
        """Return gradients as they are passed to the optimizer, by their names in it."""
        ...
