"""Meta-training on trajectories: what learning along one is to leave behind.

Shapes: T trajectories, S rows of a trajectory, B rows of a step, Q query rows, W classes.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarun.algorithms.base import forward, own_parameters, task_metric
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
    """Learns what a gradient step on each step of a trajectory begins from, and acts through.

    The meta-loss is that of the query rows after the last step: held-out rows of the
    trajectory's tasks and, where `data.remember` says so, random rows of all training classes
    (Javed & White 2019, Algorithm 2; Beaulieu et al. 2020, section 3).

    The official codes take the inner gradients as constants, and so do we unless
    `second_order_from` says otherwise; the papers differentiate them. With `reset`, the last
    layer's rows of a trajectory's classes are drawn anew before it, as in both codes, so that no
    class can be known by heart.

    A lifetime changes the head alone. A subclass says what a training trajectory changes.

    Args:
        inner_lr: Learning rate along a training trajectory.
        second_order_from: Update from which inner gradients are differentiated; None is never.
        **common: Those of `WeightLearner` and `Algorithm`.

    Raises:
        ValueError: A number is out of range, or a lifetime is to change more than the head.
    """

    meta_trains: ClassVar[bool] = True
    inside: ClassVar[tuple[str, ...]]
    """Prefixes of the parameters that a training trajectory changes."""

    def __init__(
        self,
        *,
        inner_lr: float = 0.003,
        second_order_from: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_inner_loop(inner_lr, 1, second_order_from)
        if self.adapt != "head":
            name = type(self).__name__
            raise ValueError(f"{name} changes the head alone along a stream: use algo.adapt=head")
        self.inner_lr = inner_lr
        self.second_order_from = second_order_from
        self.optimizer = self.build_optimizer()

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        assert self.spec.streams is not None
        rows = self.spec.streams["train"].rows
        first_order = is_first_order(self.second_order_from, progress)
        if self.reset:
            # What is drawn depends on the labels of all trajectories of the update.
            self._forget(gather_rows(batch.support_y, progress.share))

        def task(net: Any, params: Params, *parts: Tensor) -> tuple[Tensor, Any]:
            support_x, support_y, query_x, query_y = parts
            after = self._roll_out(net, params, support_x, support_y, rows, first_order)
            outputs = forward(net, after, query_x, ForwardContext())
            loss = self.loss(outputs, query_y)
            return loss, (loss, outputs)

        parts = (batch.support_x, batch.support_y, batch.query_x, batch.query_y)
        grads, (losses, outputs) = self.resolved_engine().gradients(
            task, self.net, own_parameters(self.net), parts
        )
        self.optimizer.step({f"net.{name}": grad for name, grad in grads.items()}, progress)
        score = task_metric(self.spec, outputs, batch.query_y)
        return {"loss": losses.mean(), self.spec.metric: score.mean()}

    def _roll_out(
        self, net: Any, params: Params, x: Tensor, y: Tensor, rows: int, first_order: bool
    ) -> Params:
        """All parameters after the rows (S, …) of one trajectory."""
        fast = {name: value for name, value in params.items() if name.startswith(self.inside)}
        if self.inside == ("head.",):
            # The representation is the same at each step: once for all.
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
        """Draw the last layer's rows of these classes anew: N(0, 2 / F), as Kaiming normal."""
        if self.spec.kind != "classification":
            return
        weight = self.net.head.last.weight
        classes = labels.unique()
        drawn = torch.randn(len(classes), weight.shape[1], dtype=weight.dtype).to(weight.device)
        with torch.no_grad():
            weight[classes] = drawn * math.sqrt(2.0 / weight.shape[1])
