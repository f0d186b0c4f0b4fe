"""Reptile (Nichol, Achiam & Schulman 2018; code openai/supervised-reptile).

Shapes: T tasks, S support rows, Q query rows, B rows of a mini-batch, D outputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup, forward, own_parameters, task_metric
from metarun.algorithms.common.adapting import AdaptingLearner, Support
from metarun.algorithms.functional import AdamState, Params, adam_start, adam_step, gradient
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.normalization import move_running_statistics
from metarun.core import seeding
from metarun.core.checks import at_least, positive
from metarun.core.distributed import gather_rows
from metarun.core.types import Metrics, Progress, TaskBatch

Moments = dict[str, tuple[Tensor, Tensor]]
Inner = Literal["adam", "sgd"]
InnerLoss = Literal["mean", "sum"]


class Reptile(AdaptingLearner):
    """Reptile: moves the initialization toward the weights after training on each task.

    The update is theta <- theta + epsilon * mean_i (U_i(theta) - theta) (Algorithm 2), where
    U_i(theta) are the weights after training on task i. The outer optimizer is SGD with rate
    epsilon on the gradient theta - mean_i U_i(theta), so `optim.lr=1` with a linear schedule is
    the code's step. A task is trained on *all* of its rows, support and query, in shuffled
    mini-batches.

    As in the code, the inner Adam (beta1 = 0) keeps its second moments from task to task. The
    tasks of a batch therefore form a sequence, and every evaluation starts from those moments.
    The code's non-transductive evaluation takes the batch statistics of the support rows and one
    query row; `bn=support` leaves that row out.

    The code adds up the loss over the rows of a mini-batch (`inner_loss=sum`). With SGD this is a
    rate B times as large. Adam's steps do not depend on the scale of the loss, unless it changes:
    evaluation starts from the moments of training, so that its steps are about
    eval_inner_batch / inner_batch times as long as with a mean.

    Args:
        inner_lr: Inner learning rate.
        inner_steps: Number of mini-batches per task in training.
        inner_batch: Rows of a mini-batch in training, B; None takes all rows.
        eval_inner_batch: Rows of a mini-batch at evaluation; None takes all rows.
        inner_optimizer: Optimizer of the inner loop, `adam` with beta1 = 0 or `sgd`. The paper's
            tables are from `adam`, its comparison of sums of gradients (section 6.2) from `sgd`.
        inner_loss: Inner loss over the rows of a mini-batch, `mean`, or `sum` as in the code.
        carry_moments: Whether Adam's moments are kept from task to task, as in the code; otherwise
            they are zero at the start of each task.

    Raises:
        ValueError: A setting is out of range.
    """

    betas = (0.0, 0.999)

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        inner_lr: float = 0.001,
        inner_steps: int = 5,
        inner_batch: int | None = 10,
        eval_inner_batch: int | None = 5,
        inner_optimizer: Inner = "adam",
        inner_loss: InnerLoss = "mean",
        carry_moments: bool = True,
    ) -> None:
        super().__init__(setup)
        positive("algo", inner_lr=inner_lr)
        at_least("algo", 1, inner_steps=inner_steps)
        batches = {"inner_batch": inner_batch, "eval_inner_batch": eval_inner_batch}
        at_least("algo", 1, null="or null for all rows", **batches)
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.inner_batch = inner_batch
        self.eval_inner_batch = eval_inner_batch
        self.inner_optimizer = inner_optimizer
        self.inner_loss = inner_loss
        self.carry_moments = carry_moments
        sequence = (
            "algo.carry_moments=true makes the tasks of an update a sequence: set "
            "algo.carry_moments=false"
        )
        self.capabilities = replace(
            self.capabilities,
            order_free=eval_inner_batch is None,
            needs_whole_batch=sequence if carry_moments and inner_optimizer == "adam" else None,
        )
        self.net = self.build_network(self.spec.output_dim)
        self.optimizer = self.build_optimizer()
        for name, param in own_parameters(self.net).items():
            self.register_buffer(_buffer(name), torch.zeros_like(param))
        self.register_buffer("inner_count", torch.zeros(()))

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        x = torch.cat([batch.support_x, batch.query_x], 1)
        y = torch.cat([batch.support_y, batch.query_y], 1)
        first = progress.first_task(batch.num_tasks)
        keys = seeding.task_keys(self.seed, "mini-batches", first, batch.num_tasks, x.device)
        order = mini_batches(keys, x.shape[1], self.inner_batch, self.inner_steps)
        theta = {name: p.detach() for name, p in own_parameters(self.net).items()}
        state = self._stored_state()
        total = {name: torch.zeros_like(p) for name, p in theta.items()}
        losses, scores, seen = [], [], []
        for i in range(batch.num_tasks):
            weights = theta
            if not self.carry_moments:
                state = adam_start(theta)
            for rows in order[i]:
                weights, state = self._step(self.net, weights, state, x[i, rows], y[i, rows])
            moments: Moments = {}
            with torch.no_grad():
                outputs = forward(self.net, weights, x[i], ForwardContext(moments=moments))
                losses.append(self.loss(outputs, y[i]))
                scores.append(task_metric(self.spec, outputs, y[i]))
            seen.append(moments)
            total = {name: total[name] + weights[name] for name in theta}
        grads = {f"net.{n}": p - total[n] / batch.num_tasks for n, p in theta.items()}
        self.optimizer.step(grads, progress)
        self._follow(seen, progress)
        if self.carry_moments:
            self._store_state(state)
        return {
            "loss": torch.stack(losses).mean(),
            self.spec.metric: torch.stack(scores).mean(),
        }

    def _follow(self, seen: list[Moments], progress: Progress) -> None:
        """Move the running statistics of batch norm toward each task's moments in turn."""
        stacked = {
            name: [torch.stack([moments[name][i] for moments in seen]) for i in range(2)]
            for name in seen[0]
        }
        whole = {n: [gather_rows(part, progress.share) for part in s] for n, s in stacked.items()}
        for moments in zip(*(zip(*pair, strict=True) for pair in whole.values()), strict=True):
            move_running_statistics(self.net, dict(zip(whole, moments, strict=True)))

    def path(self, net: nn.Module, theta: Params, support: Support, steps: int) -> list[Params]:
        """Return the weights before and after each mini-batch at evaluation."""
        x, y, _ = support
        # One key for all tasks, so that predictions follow a permutation of the tasks.
        key = torch.tensor(seeding.key(self.seed, "evaluation"), device=x.device)
        order = mini_batches(key, x.shape[0], self.eval_inner_batch, steps)
        state = self._stored_state() if self.carry_moments else adam_start(theta)
        path = [theta]
        for rows in order:
            weights, state = self._step(net, path[-1], state, x[rows], y[rows])
            path.append(weights)
        return path

    def _step(
        self, net: nn.Module, weights: Params, state: AdamState, x: Tensor, y: Tensor
    ) -> tuple[Params, AdamState]:
        """Return the weights and Adam's state after one mini-batch of inner training."""

        def loss(params: Params) -> Tensor:
            mean = self.loss(forward(net, params, x, ForwardContext()), y)
            return mean * len(x) if self.inner_loss == "sum" else mean

        grads = gradient(loss, weights, first_order=True)
        if self.inner_optimizer == "sgd":
            return {n: p.detach() - self.inner_lr * grads[n] for n, p in weights.items()}, state
        weights = {name: p.detach() for name, p in weights.items()}
        return adam_step(weights, grads, state, lr=self.inner_lr, betas=self.betas)

    def _stored_state(self) -> AdamState:
        second = {name: self.get_buffer(_buffer(name)) for name in own_parameters(self.net)}
        # With beta1 = 0 the first moment is the gradient itself and holds no memory.
        first = {name: torch.zeros_like(moment) for name, moment in second.items()}
        return AdamState(first, second, self.get_buffer("inner_count"))

    def _store_state(self, state: AdamState) -> None:
        for name, moment in state.second.items():
            self.get_buffer(_buffer(name)).copy_(moment)
        self.get_buffer("inner_count").copy_(state.count)


def mini_batches(keys: Tensor, num_rows: int, size: int | None, steps: int) -> Tensor:
    """Return the row indices of shuffled mini-batches, (*K, steps, B), as in the code of Reptile.

    The rows are shuffled again each time all have been used. A mini-batch may contain rows from
    before and after a shuffle.

    Args:
        keys: Seeding keys, (*K).
        num_rows: Number of rows of the task.
        size: Rows of a mini-batch, B, at most `num_rows`; None takes all rows.
        steps: Number of mini-batches.
    """
    size = num_rows if size is None else min(size, num_rows)
    epochs = -(-steps * size // num_rows)
    orders = [seeding.choose(keys, epoch, num_rows, num_rows) for epoch in range(epochs)]
    if not orders:
        return torch.zeros((*keys.shape, 0, size), dtype=torch.int64, device=keys.device)
    flat = torch.cat(orders, -1)[..., : steps * size]
    return flat.reshape(*keys.shape, steps, size)


def _buffer(name: str) -> str:
    """Return the buffer name of a parameter's second moment; buffer names cannot contain dots."""
    return f"second_moment/{name.replace('.', '/')}"
