"""MAML++ (Antoniou, Edwards & Storkey 2019; code AntreasAntoniou/HowToTrainYourMAMLPytorch).

Shapes: T tasks, S support rows, Q query rows, D outputs, K inner steps, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup, forward, own_parameters, task_metric
from metarun.algorithms.common.adapting import AdaptingLearner, Support
from metarun.algorithms.functional import (
    Params,
    add_prefix,
    check_inner_loop,
    descend,
    dict_key,
    gradient_and_extras,
    is_first_order,
    strip_prefix,
)
from metarun.algorithms.outer_program import OuterTask
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.normalization import BatchNorm, norm_parameters
from metarun.core.checks import within
from metarun.core.types import Progress, TaskBatch
from metarun.execution.engine import TwoStageTask

Moments = dict[str, tuple[Tensor, Tensor]]


class MAMLpp(AdaptingLearner):
    """MAML++: MAML with additions that stabilize training; with all of them off it is MAML.

    - Multi-step loss (section 4, eq. 3): early in training the outer loss is a weighted sum of
      the query losses after every inner step; see `loss_weights`.
    - Learned inner rates for each parameter tensor and each step (LSLR).
    - Running statistics (BNRS), scale and shift (BNWB) of batch norm for each step. The support
      pass of step j and the query pass after update j share row j.
    - Derivative-order annealing: `second_order_from`. The paper is first-order in the first half
      of training; the configurations in the official code are second-order throughout.
    - A cosine schedule of the outer rate: `optim.schedule`.

    At evaluation, steps beyond the training's K use the rates and rows of the last step. The code
    has an untrained spare rate for one further step, and no rows. As in the code, training
    normalizes by the statistics of the forward pass. The running statistics of each step therefore
    matter only with `bn=running`; the code never reads them.

    Args:
        inner_lr: Inner learning rate, or the initial value of learned rates.
        inner_steps: Inner steps in training, K.
        second_order_from: Update from which inner gradients are differentiated; None is never.
        multi_step_loss: Fraction of training with the multi-step loss; 0 turns it off. The code
            has 10 of 100 epochs for Omniglot and 15 for miniImageNet.
        per_step_rates: Whether the inner rates are learned, for each tensor and step (LSLR).
        per_step_statistics: Whether batch norm keeps running statistics for each step (BNRS).
        per_step_affine: Whether batch norm learns scale and shift for each step (BNWB).
        adapt_norm: Whether the inner loop adapts scale and shift of normalization layers, too. The
            code's configurations do not (`enable_inner_loop_optimizable_bn_params`), nor does the
            code of MAML.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        inner_lr: float = 0.1,
        inner_steps: int = 5,
        second_order_from: int | None = 0,
        multi_step_loss: float = 0.1,
        per_step_rates: bool = True,
        per_step_statistics: bool = True,
        per_step_affine: bool = True,
        adapt_norm: bool = False,
    ) -> None:
        super().__init__(setup)
        check_inner_loop(inner_lr, inner_steps, second_order_from, fewest=1)
        within("algo", "[0, 1]", multi_step_loss=multi_step_loss)
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.second_order_from = second_order_from
        self.multi_step_loss = multi_step_loss
        self.per_step_statistics = per_step_statistics
        self.net = self.build_network(self.spec.output_dim)
        norms = norm_parameters(self.net)
        self.adapted = [n for n in own_parameters(self.net) if adapt_norm or n not in norms]
        self.stacked: set[str] = set()
        if per_step_affine:
            self._stack("weight", "bias")
        if per_step_statistics:
            self._stack("running_mean", "running_var")
        self.rates = nn.ParameterDict()
        if per_step_rates:
            start = torch.full((inner_steps,), inner_lr)
            for name in self.adapted:
                self.rates[dict_key(name)] = nn.Parameter(start.clone())
        self.optimizer = self.build_optimizer()

    def outer_task(self, batch: TaskBatch, progress: Progress) -> OuterTask:
        first_order = is_first_order(self.second_order_from, progress)
        shares = self._loss_weights(progress)
        counts = [share > 0.0 for share in shares]

        def adapted(net: nn.Module, params: Params, x: Tensor, y: Tensor, noise: Tensor) -> Params:
            ctx = ForwardContext(noise=noise, double_backward=not first_order)
            path = self._descent(
                net, params, x, y, ctx, steps=self.inner_steps, first_order=first_order
            )
            made: Params = {}
            for step, (theta, moments) in enumerate(path):
                if counts[step]:
                    made |= add_prefix(f"{step} ", {name: theta[name] for name in self.adapted})
                made |= add_prefix(
                    f"{step} mean ", {name: mean for name, (mean, _) in moments.items()}
                )
                made |= add_prefix(
                    f"{step} var ", {name: var for name, (_, var) in moments.items()}
                )
            return made

        def query_loss(
            net: nn.Module, params: Params, made: Params, *rows: Tensor
        ) -> tuple[Tensor, Any]:
            _, _, query_x, query_y, noise, weights = rows
            theta, _ = _split(params)
            loss = query_x.new_zeros(())
            seen: list[list[Moments]] = []
            for step in range(self.inner_steps):
                means, variances = (
                    strip_prefix(f"{step} mean ", made),
                    strip_prefix(f"{step} var ", made),
                )
                seen.append([{name: (means[name], variances[name]) for name in means}])
                if counts[step]:
                    moments: Moments = {}
                    own = {name: made[f"{step} {name}"] for name in self.adapted}
                    now = self._at(net, {**theta, **own}, step)
                    outputs = forward(
                        net, now, query_x, ForwardContext(noise=noise, moments=moments)
                    )
                    loss = loss + weights[step] * self.loss(outputs, query_y)
                    seen[-1].append(moments)
            kept = _stack_moments(seen) if self.per_step_statistics else seen[-1][-1]
            return loss, (loss, task_metric(self.spec, outputs, query_y), kept)

        weights = batch.support_x.new_tensor(shares).expand(batch.num_tasks, -1)
        rows = (*self.training_rows(batch, progress), weights)
        return TwoStageTask(adapted, query_loss, reads=(0, 1, 4)), rows

    def path(self, net: nn.Module, theta: Params, support: Support, steps: int) -> list[Params]:
        """Return the tensors that the network reads before and after each inner step."""
        ctx = ForwardContext(running=self.bn == "running")
        params = {**self.optimizer.targets, **add_prefix("net.", theta)}
        x, y, _ = support
        descent = self._descent(net, params, x, y, ctx, steps=steps, first_order=True)
        start = self._at(net, theta, 0)
        return [start, *(self._at(net, weights, step) for step, (weights, _) in enumerate(descent))]

    def _descent(
        self,
        net: nn.Module,
        params: Params,
        x: Tensor,
        y: Tensor,
        ctx: ForwardContext,
        *,
        steps: int,
        first_order: bool,
    ) -> Iterator[tuple[Params, Moments]]:
        """Yield the network's parameters after each step and the moments of its support pass."""
        theta, rates = _split(params)
        adapted = {name: theta[name] for name in self.adapted}
        for step in range(steps):
            loss = partial(self._support_loss, net, theta, x, y, ctx, step)
            grads, moments = gradient_and_extras(loss, adapted, first_order=first_order)
            adapted = descend(adapted, grads, lr=self._rates_at(rates, step))
            yield {**theta, **adapted}, moments

    def _support_loss(
        self,
        net: nn.Module,
        theta: Params,
        x: Tensor,
        y: Tensor,
        ctx: ForwardContext,
        step: int,
        adapted: Params,
    ) -> tuple[Tensor, Moments]:
        moments: Moments = {}
        now = self._at(net, {**theta, **adapted}, step)
        return self.loss(forward(net, now, x, replace(ctx, moments=moments)), y), moments

    def _at(self, net: nn.Module, theta: Params, step: int) -> Params:
        """Return the tensors that the network reads at a step: of stacked tensors, their row."""
        kept = {**dict(net.named_buffers()), **theta} if self.per_step_statistics else theta
        row = min(step, self.inner_steps - 1)
        return {name: kept[name][row] if name in self.stacked else kept[name] for name in kept}

    def _rates_at(self, rates: Params, step: int) -> float | Params:
        if not rates:
            return self.inner_lr
        row = min(step, self.inner_steps - 1)
        return {name: rates[dict_key(name)][row] for name in self.adapted}

    def _loss_weights(self, progress: Progress) -> list[float]:
        if progress.fraction < self.multi_step_loss:
            return loss_weights(self.inner_steps, progress.fraction / self.multi_step_loss)
        return [0.0] * (self.inner_steps - 1) + [1.0]

    def _stack(self, *keys: str) -> None:
        """Replace these tensors of every batch norm by stacks with a row for each inner step."""
        for prefix, module in self.net.named_modules():
            if isinstance(module, BatchNorm):
                for key in keys:
                    value = getattr(module, key)
                    rows = value.detach().expand(self.inner_steps, -1).clone()
                    learned = isinstance(value, nn.Parameter)
                    own = nn.Parameter(rows, value.requires_grad) if learned else rows
                    setattr(module, key, own)
                    self.stacked.add(f"{prefix}.{key}")


def loss_weights(steps: int, annealed: float) -> list[float]:
    """Return the weights of the query losses after each of K inner steps; they sum to 1.

    All weights are equal at first. As `annealed` goes from 0 to 1, all but the last decrease
    linearly toward 0, but not below 0.03 / K, as in the code. The code changes them once per
    epoch.

    Args:
        steps: Number of inner steps, K.
        annealed: Fraction of the multi-step phase that has passed.
    """
    early = max((1.0 - annealed) / steps, 0.03 / steps)
    return [early] * (steps - 1) + [1.0 - (steps - 1) * early]


def _stack_moments(seen: list[list[Moments]]) -> Moments:
    """Return moments (K, C): for each step, the mean over its forward passes."""

    def rows(name: str, which: int) -> Tensor:
        steps = [torch.stack([moments[name][which] for moments in step]) for step in seen]
        return torch.stack([passes.mean(0) for passes in steps])

    return {name: (rows(name, 0), rows(name, 1)) for name in seen[0][0]}


def _split(params: Params) -> tuple[Params, Params]:
    """Split the meta-learned parameters into those of the network and the learned rates."""
    theta = strip_prefix("net.", params)
    rates = strip_prefix("rates.", params)
    return theta, rates
