"""Fast context adaptation via meta-learning (Zintgraf et al. 2019; code lmzintgraf/cavia).

Shapes: T tasks, S support rows, Q query rows, D outputs, E context parameters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm, forward, own_parameters, positive, task_metric
from metarun.algorithms.functional import (
    Loss,
    Params,
    check_inner_loop,
    is_first_order,
    sgd_adapt,
    sgd_path,
)
from metarun.algorithms.outer_optimizer import update_running_statistics
from metarun.backbones.layers.context import ForwardContext
from metarun.core.types import Metrics, Prediction, Progress, TaskBatch
from metarun.execution.engine import TaskFunction


class CAVIA(Algorithm):
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
        **common: Arguments of `Algorithm`.

    Raises:
        ValueError: A setting is out of range, or the backbone does not read a context.
    """

    def __init__(
        self,
        *,
        num_context: int = 5,
        inner_lr: float = 1.0,
        inner_steps: int = 1,
        second_order_from: int | None = 0,
        task_clip: float | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_inner_loop(inner_lr, inner_steps, second_order_from)
        positive("num_context", num_context)
        if task_clip is not None and task_clip <= 0:
            raise ValueError(f"algo.task_clip={task_clip}: expected a positive number, or null")
        self.num_context = num_context
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.second_order_from = second_order_from
        self.task_clip = task_clip
        self.net = self.build_network(self.spec.output_dim, context_dim=num_context)
        self.optimizer = self.build_optimizer()

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        first_order = is_first_order(self.second_order_from, progress)

        def task(net: nn.Module, params: Params, *rows: Tensor) -> tuple[Tensor, Any]:
            support_x, support_y, query_x, query_y, noise = rows
            moments: dict[str, tuple[Tensor, Tensor]] = {}
            inner = ForwardContext(noise=noise, double_backward=not first_order)
            adapted = sgd_adapt(
                self._support_loss(net, params, support_x, support_y, inner),
                self._start(support_x),
                lr=self.inner_lr,
                steps=self.inner_steps,
                first_order=first_order,
            )
            ctx = ForwardContext(moments=moments, noise=noise, context=adapted["context"])
            outputs = forward(net, params, query_x, ctx)
            loss = self.loss(outputs, query_y)
            return loss, (loss, outputs, moments)

        rows = self.training_rows(batch, progress)
        grads, (losses, outputs, moments) = self._gradients(task, rows)
        self.optimizer.step({f"net.{name}": grad for name, grad in grads.items()}, progress)
        update_running_statistics(self.net, moments)
        score = task_metric(self.spec, outputs, batch.query_y)
        return {"loss": losses.mean(), self.spec.metric: score.mean()}

    def predict(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Prediction:
        """Adapt to T tasks and predict; the adapted context is the embedding of a task."""
        steps = self.evaluation_steps(self.inner_steps)

        def task(net: nn.Module, params: Params, *rows: Tensor) -> tuple[Tensor, Tensor]:
            context = self._path(net, params, rows[0], rows[1], steps)[-1]
            return self.answer(net, params, rows[0], rows[2], context), context

        rows = (support_x, support_y, query_x)
        outputs, contexts = self.resolved_engine().map(
            task, self.net, own_parameters(self.net), rows
        )
        return Prediction(outputs, embedding=contexts)

    def trace(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, steps: int) -> Tensor:
        def task(net: nn.Module, params: Params, *rows: Tensor) -> Tensor:
            path = self._path(net, params, rows[0], rows[1], steps)
            return torch.stack([self.answer(net, params, rows[0], rows[2], phi) for phi in path])

        return self.map_tasks(task, support_x, support_y, query_x).movedim(1, 0)

    def _path(
        self, net: nn.Module, params: Params, x: Tensor, y: Tensor, steps: int
    ) -> list[Tensor]:
        """Return the contexts (E,) before and after each inner step at evaluation."""
        loss = self._support_loss(net, params, x, y, ForwardContext(running=self.bn == "running"))
        start = self._start(x)
        path = sgd_path(loss, start, lr=self.inner_lr, steps=steps, first_order=True)
        return [phi["context"] for phi in (start, *path)]

    def _start(self, like: Tensor) -> Params:
        return {"context": like.new_zeros(self.num_context)}

    def _support_loss(
        self, net: nn.Module, params: Params, x: Tensor, y: Tensor, ctx: ForwardContext
    ) -> Loss:
        def loss(phi: Params) -> Tensor:
            return self.loss(forward(net, params, x, replace(ctx, context=phi["context"])), y)

        return loss

    def _gradients(self, task: TaskFunction, rows: tuple[Tensor, ...]) -> tuple[Params, Any]:
        """Return the outer gradients, each task's clamped before the mean, and the extras."""
        engine, params, clip = self.resolved_engine(), own_parameters(self.net), self.task_clip
        if clip is None:
            return engine.gradients(task, self.net, params, rows)

        def gradient(net: nn.Module, params: Params, *row: Tensor) -> Any:
            return torch.func.grad(lambda theta: task(net, theta, *row), has_aux=True)(params)

        grads, extras = engine.map(gradient, self.net, params, rows)
        return {name: grad.clamp(-clip, clip).mean(0) for name, grad in grads.items()}, extras
