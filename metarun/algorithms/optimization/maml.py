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

from metarun.algorithms.base import LearnerSetup, own_parameters
from metarun.algorithms.common.adapting import Support
from metarun.algorithms.common.adversarial import Answer, SupportTerm
from metarun.algorithms.common.inner_loop import InnerLoopLearner
from metarun.algorithms.functional import (
    Loss,
    Params,
    add_prefix,
    check_inner_loop,
    descend,
    dict_key,
    gradient,
    gradient_backwards,
    is_first_order,
    strip_prefix,
    with_gradient,
)
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.normalization import norm_parameters
from metarun.core.checks import positive
from metarun.core.types import Progress
from metarun.execution.engine import TaskFunction, TwoStageTask

Part = Literal["all", "head", "body"]
Rates = Literal["fixed", "tensor", "element"]


class MAML(InnerLoopLearner):
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

    Raises:
        ValueError: A setting is out of range.
    """

    term_at_evaluation: Callable[[Tensor], SupportTerm] | None = None
    """Function from support inputs (S, *input_shape) to a term of the inner loss at evaluation.

    An adversary sets it."""

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        inner_lr: float | Sequence[float] = 0.01,
        inner_steps: int = 1,
        second_order_from: int | None = 0,
        adapt: Part = "all",
        adapt_norm: bool = True,
        rates: Rates = "fixed",
        inner_clip: float | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__(setup)
        low, high = _range(inner_lr)
        _check(low, high, inner_steps, second_order_from, rates, inner_clip)
        self.inner_steps = inner_steps
        self.second_order_from = second_order_from
        self.inner_clip = inner_clip
        self.recompute = recompute
        self.net = self.build_network(self.spec.output_dim)
        kept = set() if adapt_norm else norm_parameters(self.net)
        self.adapted = [
            name
            for name in own_parameters(self.net)
            if (adapt == "all" or name.startswith(f"{adapt}.")) and name not in kept
        ]
        if not self.adapted:
            raise ValueError(
                f"algo.adapt={adapt}: the network has no such parameters that learn: their names "
                "begin with head. or body., and frozen ones are left out"
            )
        self.inner_lr = low
        self.rates = nn.ParameterDict()
        if rates != "fixed":
            for name, param in own_parameters(self.net).items():
                if name in self.adapted:
                    shape = param.shape if rates == "element" else ()
                    start = torch.empty(shape).uniform_(low, high) if low < high else low
                    self.rates[dict_key(name)] = nn.Parameter(torch.zeros(shape) + start)
        self.optimizer = self.build_optimizer()

    def inner_step(
        self, loss: Loss, weights: Params, params: Params, *, first_order: bool
    ) -> Params:
        learned = strip_prefix("rates.", params)
        rates = {name: learned[dict_key(name)] for name in weights} if learned else self.inner_lr
        grads = gradient(loss, weights, first_order=first_order)
        return descend(weights, grads, lr=rates, clip=self.inner_clip)

    def training_task(self, *, first_order: bool, ways: int) -> TaskFunction:
        task = super().training_task(first_order=first_order, ways=ways)
        if first_order or not self.recompute:
            return task
        assert isinstance(task, TwoStageTask)

        def recomputed(net: nn.Module, params: Params, *rows: Tensor) -> tuple[Tensor, Any]:
            x, y, noise = task.support_rows(rows)
            support = Support(x, y, ways)
            ctx = ForwardContext(noise=noise, double_backward=True)

            def step(weights: Params, params: Params) -> Params:
                loss = self.support_loss(net, strip_prefix("net.", params), support, ctx)
                return self.inner_step(loss, weights, params, first_order=False)

            grads, extras = gradient_backwards(
                lambda params: self.start(net, strip_prefix("net.", params), support, ctx),
                step,
                lambda weights, params: task.predict(net, params, weights, *rows),
                params,
                steps=self.inner_steps,
            )
            return with_gradient(params, grads), extras

        return recomputed

    def path(self, net: nn.Module, theta: Params, support: Support, steps: int) -> list[Params]:
        if self.term_at_evaluation is None:
            return super().path(net, theta, support, steps)
        ctx = ForwardContext(running=self.bn == "running")
        loss = self._loss_and(self.term_at_evaluation(support.x), net, theta, support, ctx)
        params = {**self.optimizer.targets, **add_prefix("net.", theta)}
        path = self.descent(net, params, support, ctx, steps=steps, first_order=True, loss=loss)
        return list(path)

    def _loss_and(
        self,
        term: SupportTerm,
        net: nn.Module,
        theta: Params,
        support: Support,
        ctx: ForwardContext,
    ) -> Loss:
        """Return the inner loss plus a term, as a function of the adapted weights."""

        def loss(weights: Params) -> Tensor:
            def logits(rows: Tensor) -> Tensor:
                return self.outputs(net, theta, weights, rows, ctx)

            outputs = logits(support.x)
            added = term(outputs, logits)
            return self.inner_loss(outputs, support.y) + added

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
        theta, support = strip_prefix("net.", params), Support(support_x, support_y, 0)
        first_order = is_first_order(self.second_order_from, progress)
        ctx = ForwardContext(noise=noise, double_backward=not first_order)
        loss = None if term is None else self._loss_and(term, net, theta, support, ctx)
        *_, weights = self.descent(
            net, params, support, ctx, steps=self.inner_steps, first_order=first_order, loss=loss
        )
        return lambda x, ctx: self.outputs(net, theta, weights, x, ctx)


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
    rates: str,
    inner_clip: float | None,
) -> None:
    if not low <= high < float("inf"):
        raise ValueError(f"algo.inner_lr={[low, high]}: expected [low, high], positive numbers")
    check_inner_loop(low, inner_steps, second_order_from)
    if low < high and rates == "fixed":
        raise ValueError("algo.inner_lr: a range needs learned rates: use algo.rates=element")
    positive("algo", null="or null", inner_clip=inner_clip)
