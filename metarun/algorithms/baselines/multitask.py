"""The multi-task baseline of MAML: an average in parameter space (Finn et al. 2017, appendix C).

Shapes: T tasks, S support rows, Q query rows, N = S + Q rows, P parameters, D outputs.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup, forward, own_parameters, task_metric
from metarun.algorithms.capabilities import Capabilities
from metarun.algorithms.common.adapting import AdaptingLearner, Support
from metarun.algorithms.functional import (
    Params,
    adam_start,
    adam_step,
    check_inner_loop,
    flatten,
    sgd_path,
    unflatten,
)
from metarun.algorithms.outer_optimizer import (
    NonFiniteError,
    update_running_statistics,
)
from metarun.backbones.layers.context import ForwardContext
from metarun.core import distributed, seeding
from metarun.core.checks import at_least, positive
from metarun.core.types import Metrics, Progress, Share, TaskBatch

Penalty = Literal["none", "l2", "mean"]


class MultiTask(AdaptingLearner):
    """Fits a model to each training task, from its own initialization, and fine-tunes their mean.

    An update fits T models by Adam on all rows of their tasks (support and query, if there are
    query rows). It adds them to the mean of all models so far, which is the network. The reported
    loss is that of the models on these rows. The outer optimizer is unused.

    A penalty makes the models similar: decay / 2 * |theta - anchor|^2 is added to the loss. The
    anchor is 0 (`l2`) or the mean of the models so far (`mean`; the first models have none). The
    paper fits one model after another, so `mean` is exactly its method with
    `train.tasks_per_step=1`. The models of one update share the mean before it.

    The paper does not give the optimizer of the models, their number of rows or the size of the
    penalty ("as high as possible without significantly deterring performance"). The official code
    does not contain this baseline.

    Args:
        fit_steps: Adam steps of each model.
        fit_lr: Adam's learning rate.
        penalty: Penalty of the models: `none`, `l2` or `mean`.
        decay: Strength of the penalty.
        inner_lr: Learning rate of the fine-tuning.
        inner_steps: Gradient steps of the fine-tuning.

    Raises:
        ValueError: A number or a word is out of range.
    """

    capabilities = Capabilities(kinds=("regression",))

    betas = (0.9, 0.999)
    models: Tensor

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        fit_steps: int = 1000,
        fit_lr: float = 0.003,
        penalty: Penalty = "none",
        decay: float = 0.001,
        inner_lr: float = 0.01,
        inner_steps: int = 5,
    ) -> None:
        super().__init__(setup)
        check_inner_loop(inner_lr, inner_steps, None)
        at_least("algo", 0, fit_steps=fit_steps, decay=decay)
        positive("algo", fit_lr=fit_lr)
        self.fit_steps = fit_steps
        self.fit_lr = fit_lr
        self.penalty = penalty
        self.decay = decay
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.net = self.build_network(self.spec.output_dim)
        self.register_buffer("models", torch.zeros((), dtype=torch.int64))

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        x = torch.cat([batch.support_x, batch.query_x], 1)
        y = torch.cat([batch.support_y, batch.query_y], 1)
        before = int(self.models)
        shapes = own_parameters(self.net)

        def task(net: nn.Module, mean: Params, *rows: Tensor) -> Any:
            start, x, y = rows
            weights = self._fit(net, start, x, y, self._anchor(mean, before))
            moments: dict[str, tuple[Tensor, Tensor]] = {}
            outputs = forward(net, unflatten(weights, mean), x, ForwardContext(moments=moments))
            return weights, self.loss(outputs, y), outputs, moments

        share = progress.share or Share(0, batch.num_tasks, batch.num_tasks)
        rows = (self._starts(before + share.first, batch.num_tasks), x, y)
        weights, losses, outputs, moments = self.resolved_engine().map(task, self.net, shapes, rows)
        loss = losses.mean()
        means = distributed.mean({"loss": loss, "weights": weights.mean(0)}, share.count)
        if not torch.isfinite(means["loss"]):
            raise NonFiniteError("loss", float(means["loss"]))
        new = share.total / (before + share.total)
        with torch.no_grad():
            for name, mean in unflatten(means["weights"], shapes).items():
                shapes[name].lerp_(mean, new)
        update_running_statistics(self.net, moments, new)
        self.models += share.total
        score = task_metric(self.spec, outputs, y)
        return {"loss": loss, self.spec.metric: score.mean()}

    def _starts(self, first: int, count: int) -> Tensor:
        """Return the initial parameters (T, P) of models `first …`, as the backbone draws them."""
        starts = []
        with torch.random.fork_rng(devices=[]):
            for model in range(first, first + count):
                seeding.seed_torch(seeding.key(self.seed, "start", model))
                fresh = self.build_network(self.spec.output_dim)
                starts.append(flatten(own_parameters(fresh)).detach())
        return torch.stack(starts).to(self.device, self.dtype)

    def _anchor(self, mean: Params, models: int) -> Tensor | None:
        """Return the anchor (P,) of the penalty; None without penalty."""
        if self.penalty == "none" or (self.penalty == "mean" and models == 0):
            return None
        anchor = flatten(mean).detach()
        return anchor if self.penalty == "mean" else torch.zeros_like(anchor)

    def _fit(
        self, net: nn.Module, start: Tensor, x: Tensor, y: Tensor, anchor: Tensor | None
    ) -> Tensor:
        """Return the parameters (P,) of one model after its training on (N, …) rows.

        The parameters are one vector, so that a step of Adam takes a few operations in all, not a
        few for each tensor.
        """
        shapes = own_parameters(net)

        def loss(theta: Tensor) -> Tensor:
            return self.loss(forward(net, unflatten(theta, shapes), x, ForwardContext()), y)

        params = {"theta": start}
        state = adam_start(params)
        for _ in range(self.fit_steps):
            theta = params["theta"]
            grad = torch.func.grad(loss)(theta)
            if anchor is not None:
                grad = grad + self.decay * (theta - anchor)
            grads = {"theta": grad}
            params, state = adam_step(params, grads, state, lr=self.fit_lr, betas=self.betas)
        return params["theta"]

    def path(self, net: nn.Module, theta: Params, support: Support, steps: int) -> list[Params]:
        """Return the parameters before and after each step of the fine-tuning."""
        ctx = ForwardContext(running=self.bn == "running")

        def loss(params: Params) -> Tensor:
            return self.loss(forward(net, params, support.x, ctx), support.y)

        path = sgd_path(loss, theta, lr=self.inner_lr, steps=steps, first_order=True)
        return [theta, *path]
