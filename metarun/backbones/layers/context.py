"""Options of a forward pass: batch statistics, random masks, context parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

BatchNormMode = Literal["transductive", "support", "running"]


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Options of one forward pass through a network.

    Attributes:
        rows: Number of leading rows from which batch norm takes its statistics; None takes all.
        running: Whether batch norm uses its running statistics instead.
        moments: Dictionary that batch norm fills with the (mean, variance) of the pass, by layer
            name, for `update_running_statistics`; None stores nothing.
        biased: Whether these variances are those that normalize the pass, rather than the unbiased
            ones of running statistics.
        noise: Key (0-dimensional int64) of the random masks of the pass; None applies no masks,
            as at evaluation.
        context: (context_dim,) context parameters of the task, for networks with a
            `context_dim`; None is the zero vector.
        double_backward: Whether the gradient of the pass is itself differentiated, as in a
            second-order inner step. The results are equal; operators with faster second
            derivatives are used.
    """

    rows: int | None = None
    running: bool = False
    moments: dict[str, tuple[Tensor, Tensor]] | None = field(default=None, repr=False)
    biased: bool = False
    noise: Tensor | None = None
    context: Tensor | None = field(default=None, repr=False)
    double_backward: bool = False


BATCH_STATISTICS = ForwardContext()
