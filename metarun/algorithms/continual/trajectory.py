"""Meta-training on trajectories: the meta-loss after learning along a trajectory step by step.

Shapes: T trajectories, S rows of a trajectory, F features.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarun.algorithms.base import LearnerSetup, forward, task_metric
from metarun.algorithms.common.online import WeightLearner
from metarun.algorithms.functional import (
    Params,
    check_inner_loop,
    descend,
    gradient,
    is_first_order,
    strip_prefix,
)
from metarun.backbones.layers.context import ForwardContext
from metarun.core.distributed import gather_rows
from metarun.core.types import Metrics, Progress, TaskBatch


class TrajectoryLearner(WeightLearner):
    """Learns an initialization and a representation for gradient steps along trajectories.

    The meta-loss is the loss of the query rows after the last step of a trajectory. Query rows
    are held-out rows of the trajectory's tasks (`train.query`) and, with `data.remember`, random
    rows of all training classes (Javed & White 2019, Algorithm 2; Beaulieu et al. 2020, section 3).
    With `reset`, the last layer's rows of a trajectory's classes are newly initialized before it,
    as in both codes, so that classes cannot be memorized.

    The official codes have two forms. The papers' equations differentiate the inner gradients, and
    so does OML's code since July 2020, with `second_order_from=0` here. Its meta-loss has held-out
    rows. Before, its inner gradients were constants, which the authors call a bug (issue 15 of
    khurramjaved96/mrcl), and so are those of ANML's code (`second_order_from=null`). There, the
    meta-loss has the trajectory's own rows (`trajectory_in_meta_loss=true` and `train.query=0`).
    The published figures precede the correction.

    Along a stream only the head changes. A subclass names the parameters that change along a
    training trajectory.

    Args:
        inner_lr: Learning rate along a training trajectory.
        second_order_from: Update from which inner gradients are differentiated; None never does.
        trajectory_in_meta_loss: Whether the meta-loss has the rows of the trajectory, too.
        **options: Options of `WeightLearner`.

    Raises:
        ValueError: A number is out of range, or `adapt` is not `head`.
    """

    capabilities = replace(WeightLearner.capabilities, meta_trains=True)
    inside: ClassVar[tuple[str, ...]]
    """Prefixes of the parameters that a training trajectory changes."""

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        inner_lr: float = 0.003,
        second_order_from: int | None = None,
        trajectory_in_meta_loss: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(setup, **options)
        check_inner_loop(inner_lr, 1, second_order_from)
        if self.part != "head":
            name = type(self).__name__
            raise ValueError(f"{name} changes only the head along a stream: use algo.adapt=head")
        self.inner_lr = inner_lr
        self.second_order_from = second_order_from
        self.trajectory_in_meta_loss = trajectory_in_meta_loss
        self.optimizer = self.build_optimizer()

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        assert self.spec.streams is not None
        rows = self.spec.streams["train"].rows
        first_order = is_first_order(self.second_order_from, progress)
        if self.reset:
            # The reset depends on the labels of all trajectories of the update.
            self._forget(gather_rows(batch.support_y, progress.share))
        query_x, query_y = batch.query_x, batch.query_y
        if self.trajectory_in_meta_loss:
            query_x = torch.cat([query_x, batch.support_x], 1)
            query_y = torch.cat([query_y, batch.support_y], 1)

        def task(net: Any, params: Params, *parts: Tensor) -> tuple[Tensor, Any]:
            support_x, support_y, query_x, query_y = parts
            own = strip_prefix("net.", params)
            after = self._roll_out(net, own, support_x, support_y, rows, first_order)
            outputs = forward(net, after, query_x, ForwardContext())
            loss = self.loss(outputs, query_y)
            return loss, (loss, task_metric(self.spec, outputs, query_y), {})

        parts = (batch.support_x, batch.support_y, query_x, query_y)
        return self.outer_step(task, parts, progress)

    def _roll_out(
        self, net: Any, params: Params, x: Tensor, y: Tensor, rows: int, first_order: bool
    ) -> Params:
        """Return all parameters after the rows (S, …) of one trajectory."""
        fast = {name: value for name, value in params.items() if name.startswith(self.inside)}
        if self.inside == ("head.",):
            # The representation is the same at each step, so it is computed once.
            x = forward(net.body, strip_prefix("body.", params), x, ForwardContext())
        for first in range(0, len(x), rows):
            seen, target = x[first : first + rows], y[first : first + rows]

            def loss(fast: Params, seen: Tensor = seen, target: Tensor = target) -> Tensor:
                if self.inside == ("head.",):
                    return self.loss(
                        forward(net.head, strip_prefix("head.", fast), seen, ForwardContext()),
                        target,
                    )
                return self.loss(forward(net, {**params, **fast}, seen, ForwardContext()), target)

            grads = gradient(loss, fast, first_order=first_order)
            fast = descend(fast, grads, lr=self.inner_lr)
        return {**params, **fast}

    def _forget(self, labels: Tensor) -> None:
        """Initialize the last layer's rows of these classes: N(0, 2 / F), as in Kaiming normal."""
        if self.spec.kind != "classification":
            return
        weight = self.net.head.last.weight
        classes = labels.unique()
        drawn = torch.randn(len(classes), weight.shape[1], dtype=weight.dtype).to(weight.device)
        with torch.no_grad():
            weight[classes] = drawn * math.sqrt(2.0 / weight.shape[1])
