"""Model-agnostic meta-learning (MAML) and the variants that are settings of it.

MAML and FOMAML: Finn, Abbeel & Levine 2017, Algorithm 1 and section 5.2; official code
cbfinn/maml. ANIL: Raghu et al. 2020. BOIL: Oh et al. 2021. Meta-SGD: Li et al. 2017.

Shapes: T tasks, S support rows, Q query rows, D outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import forward, task_metric
from metarun.algorithms.common.adapting import AdaptingLearner
from metarun.algorithms.common.adversarial import Answer, SupportTerm
from metarun.algorithms.functional import (
    Loss,
    Params,
    check_inner_loop,
    dict_key,
    gradient_backwards,
    is_first_order,
    sgd_adapt,
    sgd_path,
    strip_prefix,
    with_gradient,
)
from metarun.algorithms.outer_optimizer import update_running_statistics
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.normalization import norm_parameters
from metarun.core.types import Metrics, Progress, TaskBatch
from metarun.execution.engine import TwoStageTask

Adapted = Literal["all", "head", "body"]
Rates = Literal["fixed", "tensor", "element"]


class MAML(AdaptingLearner):
    """MAML: learns an initialization from which a few gradient steps solve a task.

    Minimizes sum_i L_i(theta - lr * grad L_i(theta; support_i); query_i) over theta (Finn et
    al. 2017, eq. 1). The outer loss is that after the last inner step, as in the official code.

    The official code's inner classification loss is a sum over the W classes; here it is a mean
    over rows. A rate alpha of the code is therefore alpha * W here (Omniglot 5-way: 0.4 there,
    2.0 here). Its batch norm is outside the inner loop: `adapt_norm=false`.

    Args:
        inner_lr: Inner learning rate. A range [low, high] initializes each learned rate from
            U[low, high) (Meta-SGD).
        inner_steps: Inner steps in training.
        second_order_from: Update from which inner gradients are differentiated; 0 is MAML,
            None (never) is FOMAML, a number in between is the annealing of MAML++.
        adapt: Parameters of the inner loop: `all`, those of the `head` (ANIL), or those of the
            `body` (BOIL: the head learns in the outer loop only).
        adapt_norm: Whether the inner loop adapts scale and shift of normalization layers, too. In
            the official code they learn in the outer loop only.
        rates: Kind of inner rates: `fixed`, one learned rate per `tensor`, or one learned rate
            per `element` (Meta-SGD).
        inner_clip: Bound that clamps each inner gradient element to [-inner_clip, inner_clip];
            None is no bound.
        recompute: Whether to recompute each inner step for the outer gradient. Memory then does
            not grow with the number of inner steps, and an update takes longer. First-order
            updates keep no graph and ignore this setting.
        **common: Arguments of `Algorithm`.

    Raises:
        ValueError: A setting is out of range.
    """

    term_at_evaluation: Callable[[Tensor], SupportTerm] | None = None
    """Function from support inputs (S, *input_shape) to a term of the inner loss at evaluation.

    An adversary sets it."""

    def __init__(
        self,
        *,
        inner_lr: float | Sequence[float] = 0.01,
        inner_steps: int = 1,
        second_order_from: int | None = 0,
        adapt: Adapted = "all",
        adapt_norm: bool = True,
        rates: Rates = "fixed",
        inner_clip: float | None = None,
        recompute: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        low, high = _range(inner_lr)
        _check(low, high, inner_steps, second_order_from, adapt, rates, inner_clip)
        self.inner_steps = inner_steps
        self.second_order_from = second_order_from
        self.inner_clip = inner_clip
        self.recompute = recompute
        self.net = self.build_network(self.spec.output_dim)
        kept = set() if adapt_norm else norm_parameters(self.net)
        self.adapted = [
            name
            for name, _ in self.net.named_parameters()
            if (adapt == "all" or name.startswith(f"{adapt}.")) and name not in kept
        ]
        self.inner_lr = low
        self.rates = nn.ParameterDict()
        if rates != "fixed":
            for name, param in self.net.named_parameters():
                if name in self.adapted:
                    shape = param.shape if rates == "element" else ()
                    start = torch.empty(shape).uniform_(low, high) if low < high else low
                    self.rates[dict_key(name)] = nn.Parameter(torch.zeros(shape) + start)
        self.optimizer = self.build_optimizer()

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        first_order = is_first_order(self.second_order_from, progress)

        def start(params: Params) -> Params:
            return self._start(self._split(params)[0])

        def after(
            net: nn.Module, weights: Params, params: Params, *rows: Tensor, steps: int = 1
        ) -> Params:
            support_x, support_y, noise = rows
            theta, rates = self._split(params)
            ctx = ForwardContext(noise=noise, double_backward=not first_order)
            loss = self._support_loss(net, theta, support_x, support_y, ctx)
            return self._after(loss, weights, rates, first_order, steps)

        def adapted(net: nn.Module, params: Params, *rows: Tensor) -> Params:
            return after(net, start(params), params, *rows, steps=self.inner_steps)

        def query_loss(
            net: nn.Module, params: Params, weights: Params, *rows: Tensor
        ) -> tuple[Tensor, Any]:
            _, _, query_x, query_y, noise = rows
            theta, _ = self._split(params)
            moments: dict[str, tuple[Tensor, Tensor]] = {}
            ctx = ForwardContext(moments=moments, noise=noise)
            outputs = forward(net, {**theta, **weights}, query_x, ctx)
            loss = self.loss(outputs, query_y)
            return loss, (loss, outputs, moments)

        task = TwoStageTask(adapted, query_loss, reads=(0, 1, 4))

        def recomputed(net: nn.Module, params: Params, *rows: Tensor) -> tuple[Tensor, Any]:
            grads, extras = gradient_backwards(
                start,
                lambda weights, params: after(net, weights, params, *task.support_rows(rows)),
                lambda weights, params: query_loss(net, params, weights, *rows),
                params,
                steps=self.inner_steps,
            )
            return with_gradient(params, grads), extras

        rows = self.training_rows(batch, progress)
        params: Params = {**self.optimizer.targets}
        grads, (losses, outputs, moments) = self.resolved_engine().gradients(
            recomputed if self.recompute and not first_order else task,
            self.net,
            params,
            rows,
        )
        self.optimizer.step(grads, progress)
        update_running_statistics(self.net, moments)
        score = task_metric(self.spec, outputs, batch.query_y)
        return {"loss": losses.mean(), self.spec.metric: score.mean()}

    def _start(self, theta: Params) -> Params:
        """Return the parameters that the inner loop adapts."""
        return {name: theta[name] for name in self.adapted}

    def _after(
        self, loss: Loss, weights: Params, rates: float | Params, first_order: bool, steps: int
    ) -> Params:
        """Return the adapted parameters after inner steps in training."""
        return sgd_adapt(
            loss, weights, lr=rates, steps=steps, first_order=first_order, clip=self.inner_clip
        )

    def path(self, net: nn.Module, theta: Params, x: Tensor, y: Tensor, steps: int) -> list[Params]:
        """Return all parameters before and after each inner step at evaluation."""
        term = None if self.term_at_evaluation is None else self.term_at_evaluation(x)
        ctx = ForwardContext(running=self.bn == "running")
        loss = self._support_loss(net, theta, x, y, ctx, term)
        start = self._start(theta)
        rates = self._rates(dict(self.rates.named_parameters()))
        path = sgd_path(loss, start, lr=rates, steps=steps, first_order=True, clip=self.inner_clip)
        return [theta, *({**theta, **adapted} for adapted in path)]

    def _support_loss(
        self,
        net: nn.Module,
        theta: Params,
        x: Tensor,
        y: Tensor,
        ctx: ForwardContext,
        term: SupportTerm | None = None,
    ) -> Loss:
        def loss(adapted: Params) -> Tensor:
            weights = {**theta, **adapted}
            outputs = forward(net, weights, x, ctx)
            if term is None:
                return self.loss(outputs, y)
            added = term(outputs, lambda rows: forward(net, weights, rows, ctx))
            return self.loss(outputs, y) + added

        return loss

    def solve(
        self,
        net: nn.Module,
        params: Params,
        support_x: Tensor,
        support_y: Tensor,
        noise: Tensor,
        progress: Progress,
        term: SupportTerm | None,
    ) -> Answer:
        """Adapt to one training task; see `AdversarialLearner.solve`."""
        theta, rates = self._split(params)
        first_order = is_first_order(self.second_order_from, progress)
        ctx = ForwardContext(noise=noise, double_backward=not first_order)
        loss = self._support_loss(net, theta, support_x, support_y, ctx, term)
        start = self._start(theta)
        weights = theta | self._after(loss, start, rates, first_order, self.inner_steps)
        return lambda x, ctx: forward(net, weights, x, ctx)

    def limited(self, grads: Params) -> Params:
        """Return gradients as they are passed to the outer optimizer: unchanged."""
        return grads

    def _split(self, params: Params) -> tuple[Params, float | Params]:
        """Split the meta-learned parameters into those of the network and the inner rates."""
        theta = strip_prefix("net.", params)
        rates = strip_prefix("rates.", params)
        return theta, self._rates(rates)

    def _rates(self, learned: Params) -> float | Params:
        return (
            {name: learned[dict_key(name)] for name in self.adapted} if learned else self.inner_lr
        )


def _range(inner_lr: float | Sequence[float]) -> tuple[float, float]:
    if isinstance(inner_lr, (int, float)):
        return inner_lr, inner_lr
    values = list(inner_lr)
    if len(values) != 2:
        raise ValueError(f"algo.inner_lr={values}: expected a number or [low, high]")
    return values[0], values[1]


def _check(
    low: float,
    high: float,
    inner_steps: int,
    second_order_from: int | None,
    adapt: str,
    rates: str,
    inner_clip: float | None,
) -> None:
    if not low <= high < float("inf"):
        raise ValueError(f"algo.inner_lr={[low, high]}: expected [low, high], positive numbers")
    check_inner_loop(low, inner_steps, second_order_from)
    if low < high and rates == "fixed":
        raise ValueError("algo.inner_lr: a range needs learned rates: use algo.rates=element")
    if adapt not in ("all", "head", "body"):
        raise ValueError(f"algo.adapt={adapt}: expected all, head or body")
    if rates not in ("fixed", "tensor", "element"):
        raise ValueError(f"algo.rates={rates}: expected fixed, tensor or element")
    if inner_clip is not None and inner_clip <= 0:
        raise ValueError(f"algo.inner_clip={inner_clip}: expected a positive number, or null")
