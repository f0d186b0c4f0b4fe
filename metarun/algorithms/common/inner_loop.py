"""Base class of algorithms that learn what gradient steps on a task's support start from (MAML).

The outer part of an update is the same for all of them: the gradient of the query loss through the
inner steps. A variant overrides the start, the inner loss or the inner step.

Shapes: T tasks, S support rows, Q query rows, D outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from metarun.algorithms.base import task_metric
from metarun.algorithms.common.adapting import AdaptingLearner, Support
from metarun.algorithms.functional import (
    Loss,
    Params,
    add_prefix,
    descend,
    gradient,
    is_first_order,
    strip_prefix,
)
from metarun.algorithms.outer_program import OuterTask
from metarun.backbones.layers.context import ForwardContext
from metarun.core.types import Progress, TaskBatch
from metarun.execution.engine import TaskFunction, TwoStageTask


class InnerLoopLearner(AdaptingLearner):
    """Learns parameters from which a few gradient steps on the support solve a task.

    Minimizes the mean query loss after `inner_steps` steps over all parameters of the optimizer
    (Finn et al. 2017, eq. 1). A subclass sets the attributes below, `self.net` and
    `self.optimizer`.

    Attributes:
        inner_lr: Inner learning rate, for the default `inner_step`.
        inner_steps: Inner steps in training.
        second_order_from: Update from which inner gradients are differentiated; None is never.
        adapted: Names of the parameters of `self.net` that the default `start` adapts.
    """

    inner_lr: float
    second_order_from: int | None
    adapted: list[str]

    def start(
        self,
        net: nn.Module,  # noqa: ARG002
        theta: Params,
        support: Support,  # noqa: ARG002
        ctx: ForwardContext,  # noqa: ARG002
    ) -> Params:
        """Return the adapted weights before the first inner step.

        Args:
            net: The network, or its replica.
            theta: Parameters of the network by name.
            support: Support rows of one task.
            ctx: Context of the forward passes over them.
        """
        return {name: theta[name] for name in self.adapted}

    def inner_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean inner loss of support rows, given their predictions."""
        return self.loss(outputs, targets)

    def inner_step(
        self,
        loss: Loss,
        weights: Params,
        params: Params,  # noqa: ARG002
        *,
        first_order: bool,
    ) -> Params:
        """Return the adapted weights after one inner step.

        Args:
            loss: Inner loss as a function of the adapted weights.
            weights: Adapted weights before the step.
            params: All meta-learned parameters, by their names in the optimizer.
            first_order: Whether to treat the inner gradient as a constant.
        """
        return descend(weights, gradient(loss, weights, first_order=first_order), lr=self.inner_lr)

    def judged(
        self,
        net: nn.Module,
        theta: Params,
        weights: Params,
        support_x: Tensor,  # noqa: ARG002
        query_x: Tensor,
        ctx: ForwardContext,
    ) -> Tensor:
        """Return the predictions (Q, D) in the outer loss of a training task.

        Args:
            net: The network, or its replica.
            theta: Parameters of the network by name.
            weights: Adapted weights after the last inner step.
            support_x: Support inputs, (S, *input_shape).
            query_x: Query inputs, (Q, *input_shape).
            ctx: Context of the forward pass.
        """
        return self.outputs(net, theta, weights, query_x, ctx)

    def support_loss(
        self, net: nn.Module, theta: Params, support: Support, ctx: ForwardContext
    ) -> Loss:
        """Return the inner loss of a task as a function of the adapted weights."""
        return lambda weights: self.inner_loss(
            self.outputs(net, theta, weights, support.x, ctx), support.y
        )

    def descent(
        self,
        net: nn.Module,
        params: Params,
        support: Support,
        ctx: ForwardContext,
        *,
        steps: int,
        first_order: bool,
        loss: Loss | None = None,
    ) -> Iterator[Params]:
        """Yield the adapted weights before and after each inner step.

        Args:
            net: The network, or its replica.
            params: All meta-learned parameters, by their names in the optimizer.
            support: Support rows of one task.
            ctx: Context of the forward passes over them.
            steps: Number of steps.
            first_order: Whether to treat inner gradients as constants.
            loss: Inner loss; None takes `support_loss`.
        """
        theta = strip_prefix("net.", params)
        loss = loss or self.support_loss(net, theta, support, ctx)
        weights = self.start(net, theta, support, ctx)
        yield weights
        for _ in range(steps):
            weights = self.inner_step(loss, weights, params, first_order=first_order)
            yield weights

    def outer_task(self, batch: TaskBatch, progress: Progress) -> OuterTask:
        first_order = is_first_order(self.second_order_from, progress)
        task = self.training_task(first_order=first_order, ways=self.training_ways(batch))
        return task, self.training_rows(batch, progress)

    def training_task(self, *, first_order: bool, ways: int) -> TaskFunction:
        """Return the function of one training task of `ways` classes for `outer_step`."""

        def adapted(net: nn.Module, params: Params, *rows: Tensor) -> Params:
            x, y, noise = rows
            ctx = ForwardContext(noise=noise, double_backward=not first_order)
            support = Support(x, y, ways)
            path = self.descent(
                net, params, support, ctx, steps=self.inner_steps, first_order=first_order
            )
            *_, last = path
            return last

        def query_loss(
            net: nn.Module, params: Params, weights: Params, *rows: Tensor
        ) -> tuple[Tensor, Any]:
            support_x, _, query_x, query_y, noise = rows
            moments: dict[str, tuple[Tensor, Tensor]] = {}
            ctx = ForwardContext(moments=moments, noise=noise)
            theta = strip_prefix("net.", params)
            outputs = self.judged(net, theta, weights, support_x, query_x, ctx)
            loss = self.loss(outputs, query_y)
            return loss, (loss, task_metric(self.spec, outputs, query_y), moments)

        return TwoStageTask(adapted, query_loss, reads=(0, 1, 4))

    def path(self, net: nn.Module, theta: Params, support: Support, steps: int) -> list[Params]:
        ctx = ForwardContext(running=self.bn == "running")
        params = {**self.optimizer.targets, **add_prefix("net.", theta)}
        return list(self.descent(net, params, support, ctx, steps=steps, first_order=True))
