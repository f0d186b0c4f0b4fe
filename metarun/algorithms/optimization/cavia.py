"""Fast context adaptation via meta-learning (Zintgraf et al. 2019; code lmzintgraf/cavia).

Shapes: T tasks, S support rows, Q query rows, D outputs, E context parameters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup, forward
from metarun.algorithms.common.adapting import Support
from metarun.algorithms.common.inner_loop import InnerLoopLearner
from metarun.algorithms.functional import Params, check_inner_loop
from metarun.backbones.layers.context import ForwardContext
from metarun.core.checks import at_least, positive
from metarun.core.types import Adapted, Prediction
from metarun.execution.engine import TaskFunction


class CAVIA(InnerLoopLearner):
    """CAVIA: adapts a small vector of context parameters, a second input of the network.

    The context phi starts at zero in every task. The inner loop changes only phi,
    phi <- phi - lr * grad_phi L(phi, theta; support) (eq. 2). The outer loop changes the network
    theta, by the gradient of the query loss through the inner steps (eq. 3). Dense networks read
    the context concatenated to their input, and Conv4 reads it through a FiLM layer in its third
    block (section 3.2).

    The official code clamps the elements of the outer gradient to [-10, 10]: in regression the
    gradient of each task (`task_clip`), in classification their mean (`optim.clip_value`). It
    initializes convolutions and head Kaiming-uniform; here they have torch's initialization.

    Args:
        num_context: Number of context parameters, E.
        inner_lr: Inner learning rate.
        inner_steps: Inner steps in training.
        second_order_from: Update from which inner gradients are differentiated; 0 is always, None
            is never (first order).
        task_clip: Bound that clamps each element of a task's outer gradient to
            [-task_clip, task_clip]; None is no bound.

    Raises:
        ValueError: A setting is out of range, or the backbone does not read a context.
    """

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        num_context: int = 5,
        inner_lr: float = 1.0,
        inner_steps: int = 1,
        second_order_from: int | None = 0,
        task_clip: float | None = None,
    ) -> None:
        super().__init__(setup)
        check_inner_loop(inner_lr, inner_steps, second_order_from)
        at_least("algo", 1, num_context=num_context)
        positive("algo", null="or null", task_clip=task_clip)
        self.num_context = num_context
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.second_order_from = second_order_from
        self.task_clip = task_clip
        self.net = self.build_network(self.spec.output_dim, context_dim=num_context)
        self.optimizer = self.build_optimizer()

    def start(
        self,
        net: nn.Module,  # noqa: ARG002
        theta: Params,  # noqa: ARG002
        support: Support,
        ctx: ForwardContext,  # noqa: ARG002
    ) -> Params:
        """Return the context (E,) before the first inner step."""
        return {"context": support.x.new_zeros(self.num_context)}

    def outputs(
        self, net: nn.Module, theta: Params, weights: Params, x: Tensor, ctx: ForwardContext
    ) -> Tensor:
        statistics = {name: tensor for name, tensor in weights.items() if name != "context"}
        ctx = replace(ctx, context=weights["context"])
        return forward(net, {**theta, **statistics}, x, ctx)

    def answer(self, adapted: Adapted, query_x: Tensor) -> Prediction:
        """Predict as `Algorithm` does; the adapted context is the embedding of a task."""
        return replace(super().answer(adapted, query_x), embedding=adapted["context"])

    def outer_gradients(self, task: TaskFunction, rows: tuple[Tensor, ...]) -> tuple[Params, Any]:
        """Return the outer gradients, each task's clamped before the mean, and the extras."""
        clip = self.task_clip
        if clip is None:
            return super().outer_gradients(task, rows)

        def gradient(net: nn.Module, params: Params, *row: Tensor) -> Any:
            return torch.func.grad(lambda theta: task(net, theta, *row), has_aux=True)(params)

        params: Params = {**self.optimizer.targets}
        grads, extras = self.resolved_engine().map(gradient, self.net, params, rows)
        return {name: grad.clamp(-clip, clip).mean(0) for name, grad in grads.items()}, extras
