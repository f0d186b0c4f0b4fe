"""How one forward pass through a network is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

BatchNormMode = Literal["transductive", "support", "running"]
BATCH_NORM_MODES: tuple[BatchNormMode, ...] = ("transductive", "support", "running")


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """How one forward pass through a network is made.

    Attributes:
        rows: Batch norm takes its statistics from the first `rows` rows; None takes all.
        running: Batch norm uses its running statistics instead.
        moments: Filled by batch norm with the (mean, variance) of the pass, by buffer name,
            for `update_running`; None keeps nothing.
        noise: Key (0-dimensional int64) of the pass's random masks; None makes no noise, as
            at evaluation.
        context: (context_dim,) vector of the task, for networks that were made with a
            `context_dim`; None is the zero vector.
        double_backward: Whether the gradient of the pass is differentiated again, as that of a
            second-order inner step is. The same numbers, by operators whose second derivatives
            are faster.
    """

    rows: int | None = None
    running: bool = False
    moments: dict[str, tuple[Tensor, Tensor]] | None = field(default=None, repr=False)
    noise: Tensor | None = None
    context: Tensor | None = field(default=None, repr=False)
    double_backward: bool = False


BATCH_STATISTICS = ForwardContext()
