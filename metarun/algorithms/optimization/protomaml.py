"""Proto-MAML (Triantafillou et al. 2020; code google-research/meta-dataset, learners/).

Shapes: T tasks, S support rows, Q query rows, W ways, F features.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm, forward, own_parameters, task_metric
from metarun.algorithms.functional import (
    Params,
    check_inner_loop,
    is_first_order,
    prototypes,
    sgd_adapt,
    sgd_path,
)
from metarun.algorithms.outer_optimizer import update_running_statistics
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.normalization import norm_parameters
from metarun.core.types import Metrics, Prediction, Progress, TaskBatch
from metarun.execution.engine import TwoStageTask

Moments = dict[str, tuple[Tensor, Tensor]]


class ProtoMAML(Algorithm):
    """Proto-MAML: MAML with a linear head that is initialized from prototypes in each task.

    With c_k the mean embedding of class k, the head starts as W_k = 2 c_k, b_k = -||c_k||^2. Its
    logits are then -||f(x) - c_k||^2 up to a term that is equal for all classes (section 3). Body
    and head take gradient steps on the support. Outer gradients flow through the prototypes, in
    the paper and in the code, also in first-order training, where only the inner gradients are
    constants. All else is as in the code. With `bn=support` (the code's
    `transductive_batch_norm=False`) batch norm normalizes query rows by the support's statistics,
    also in training; otherwise it uses the query's own.

    Args:
        inner_lr: Inner learning rate.
        inner_steps: Inner steps in training; 0 is a prototypical network.
        second_order_from: Update from which inner gradients are differentiated; None is never,
            as in the paper's fo-Proto-MAML and in the code.
        adapt_norm: Whether the inner loop adapts scale and shift of batch norm; the code does not.
        **common: Arguments of `Algorithm`.

    Raises:
        ValueError: A setting is out of range, or the tasks are not classification.
    """

    kinds: ClassVar[tuple[str, ...]] = ("classification",)
    accepts_any_way: bool = True
    label_equivariant: bool = True

    def __init__(
        self,
        *,
        inner_lr: float = 0.01,
        inner_steps: int = 5,
        second_order_from: int | None = None,
        adapt_norm: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_inner_loop(inner_lr, inner_steps, second_order_from)
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.second_order_from = second_order_from
        self.net = self.build_network(None)
        self.constant = set() if adapt_norm else norm_parameters(self.net)
        self.optimizer = self.build_optimizer()

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        ways = self.spec.train_way
        first_order = is_first_order(self.second_order_from, progress)

        def adapted(net: nn.Module, params: Params, *rows: Tensor) -> Params:
            x, y, noise = rows
            ctx = ForwardContext(noise=noise, double_backward=not first_order)
            return sgd_adapt(
                self._support_loss(net, params, x, y, ctx),
                self._start(net, params, x, y, ways, ctx),
                lr=self.inner_lr,
                steps=self.inner_steps,
                first_order=first_order,
            )

        def query_loss(
            net: nn.Module, params: Params, weights: Params, *rows: Tensor
        ) -> tuple[Tensor, Any]:
            support_x, _, query_x, query_y, noise = rows
            moments: Moments = {}
            theta = {**params, **weights}
            features = self._query_features(net, theta, support_x, query_x, noise, moments)
            logits = _head(theta, features)
            loss = self.loss(logits, query_y)
            return loss, (loss, task_metric(self.spec, logits, query_y), moments)

        task = TwoStageTask(adapted, query_loss, reads=(0, 1, 4))
        rows = self.training_rows(batch, progress)
        grads, (losses, scores, moments) = self.resolved_engine().gradients(
            task, self.net, own_parameters(self.net), rows
        )
        self.optimizer.step({f"net.{name}": grad for name, grad in grads.items()}, progress)
        update_running_statistics(self.net, moments)
        return {"loss": losses.mean(), self.spec.metric: scores.mean()}

    def predict(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Prediction:
        steps = self.evaluation_steps(self.inner_steps)
        ways = int(support_y.max()) + 1

        def adapted(net: nn.Module, params: Params, x: Tensor, y: Tensor) -> Params:
            return self._path(net, params, x, y, ways, steps)[-1]

        def answers(net: nn.Module, _: Params, weights: Params, *rows: Tensor) -> Tensor:
            return _head(weights, self.answer(net, _body(weights), rows[0], rows[2]))

        task = TwoStageTask(adapted, answers, reads=(0, 1))
        return Prediction(self.map_tasks(task, support_x, support_y, query_x))

    def trace(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, steps: int) -> Tensor:
        ways = int(support_y.max()) + 1

        def task(net: nn.Module, params: Params, *rows: Tensor) -> Tensor:
            path = self._path(net, params, rows[0], rows[1], ways, steps)
            return torch.stack(
                [_head(theta, self.answer(net, _body(theta), rows[0], rows[2])) for theta in path]
            )

        return self.map_tasks(task, support_x, support_y, query_x).movedim(1, 0)

    def _path(
        self, net: nn.Module, params: Params, x: Tensor, y: Tensor, ways: int, steps: int
    ) -> list[Params]:
        """Return body and head after 0 … `steps` inner steps at evaluation."""
        ctx = ForwardContext(running=self.bn == "running")
        loss = self._support_loss(net, params, x, y, ctx)
        start = self._start(net, params, x, y, ways, ctx)
        path = sgd_path(loss, start, lr=self.inner_lr, steps=steps, first_order=True)
        return [{**params, **adapted} for adapted in (start, *path)]

    def _start(
        self, net: nn.Module, params: Params, x: Tensor, y: Tensor, ways: int, ctx: ForwardContext
    ) -> Params:
        """Return the initial adapted parameters: those of the body, and the prototype head."""
        centers = prototypes(forward(net, params, x, ctx), y, ways)
        start = {name: param for name, param in params.items() if name not in self.constant}
        start["head.weight"] = 2.0 * centers
        start["head.bias"] = -centers.square().sum(1)
        return start

    def _support_loss(
        self, net: nn.Module, params: Params, x: Tensor, y: Tensor, ctx: ForwardContext
    ) -> Any:
        def loss(adapted: Params) -> Tensor:
            theta = {**params, **adapted}
            return self.loss(_head(theta, forward(net, _body(theta), x, ctx)), y)

        return loss

    def _query_features(
        self,
        net: nn.Module,
        theta: Params,
        support_x: Tensor,
        query_x: Tensor,
        noise: Tensor,
        moments: Moments,
    ) -> Tensor:
        """Return query features (Q, F) in training; `moments` receives the pass's statistics."""
        if self.bn != "support":
            return forward(net, _body(theta), query_x, ForwardContext(moments=moments, noise=noise))
        num_support = support_x.shape[0]
        ctx = ForwardContext(rows=num_support, moments=moments, noise=noise)
        return forward(net, _body(theta), torch.cat([support_x, query_x]), ctx)[num_support:]


def _head(theta: Params, features: Tensor) -> Tensor:
    return nn.functional.linear(features, theta["head.weight"], theta["head.bias"])


def _body(theta: Params) -> Params:
    return {name: param for name, param in theta.items() if not name.startswith("head.")}
