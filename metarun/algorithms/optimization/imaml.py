"""Implicit MAML (Rajeswaran, Finn, Kakade & Levine 2019; code aravindr93/imaml_dev).

Shapes: T tasks, S support rows, Q query rows, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup
from metarun.algorithms.common.adapting import Support
from metarun.algorithms.common.inner_loop import InnerLoopLearner
from metarun.algorithms.functional import (
    Loss,
    Params,
    add_prefix,
    flatten,
    sgd_adapt,
    sgd_path,
    strip_prefix,
    unflatten,
)
from metarun.backbones.layers.context import ForwardContext
from metarun.core.checks import at_least, positive
from metarun.execution.engine import TaskFunction, TwoStageTask

Proximal = Literal["after", "each_step"]

# Squared residual below which the solver stops, as in the official code.
_TOLERANCE = 1e-10


class IMAML(InnerLoopLearner):
    """iMAML: an implicit meta-gradient at the adapted weights, independent of the inner path.

    Adaptation solves phi = argmin L(phi; support) + lam / 2 |phi - theta|^2 (eq. 3). The
    meta-gradient is then (I + H / lam)^-1 grad L(phi; query), where H is the Hessian of the
    support loss at phi (Lemma 1). Conjugate gradients compute it from products with H
    (Algorithm 2), so memory does not grow with the number of inner steps.

    The official code differs from the paper, and the defaults are those of the code:

    - It takes plain gradient steps, then one step on lam / 2 |phi - theta|^2 alone. With
      `proximal=each_step` every step has this term, as in the paper.
    - It solves ((1 + cg_damping) I + H / (lam + lam_damping)) v = g. The paper has
      `cg_damping=0 lam_damping=0`.
    - Its evaluation has no proximal term. With `eval_lam` every step has one.
    - Its outer Adam has eps=1e-3; here it has torch's 1e-8.

    Args:
        inner_lr: Inner learning rate.
        inner_steps: Gradient steps in training, not counting the proximal step after them.
        lam: Strength of the proximal term in training.
        proximal: Place of the proximal term in training, `after` the steps or in `each_step`.
        eval_lam: Strength of the proximal term at evaluation.
        cg_steps: Conjugate-gradient steps; with 1 or 0 the meta-gradient is the query gradient at
            phi, as in the code.
        cg_damping: Number added to the unit matrix in the linear system.
        lam_damping: Number added to `lam` in the linear system only.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        inner_lr: float = 0.1,
        inner_steps: int = 16,
        lam: float = 2.0,
        proximal: Proximal = "after",
        eval_lam: float = 0.0,
        cg_steps: int = 5,
        cg_damping: float = 1.0,
        lam_damping: float = 10.0,
    ) -> None:
        super().__init__(setup)
        positive("algo", inner_lr=inner_lr, lam=lam)
        at_least("algo", 0, inner_steps=inner_steps, eval_lam=eval_lam)
        at_least("algo", 0, cg_steps=cg_steps, cg_damping=cg_damping, lam_damping=lam_damping)
        for name, value in (("lam", lam), ("eval_lam", eval_lam)):
            if inner_lr * value >= 2.0:
                raise ValueError(
                    f"algo.{name}={value}: expected less than 2 / algo.inner_lr={2 / inner_lr:g}: "
                    "larger values make the proximal step diverge"
                )
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.lam = lam
        self.proximal = proximal
        self.eval_lam = eval_lam
        self.cg_steps = cg_steps
        self.cg_damping = cg_damping
        self.lam_damping = lam_damping
        self.second_order_from = None
        self.net = self.build_network(self.spec.output_dim)
        self.optimizer = self.build_optimizer()

    def training_task(self, *, first_order: bool, ways: int) -> TaskFunction:
        """Return the function of one training task, whose result is (meta-gradient, extras)."""
        outer = super().training_task(first_order=first_order, ways=ways)
        assert isinstance(outer, TwoStageTask)

        def task(net: nn.Module, params: Params, *rows: Tensor) -> tuple[Params, Any]:
            theta = strip_prefix("net.", params)
            support = Support(rows[0], rows[1], ways)

            def support_loss(*, double_backward: bool) -> Loss:
                ctx = ForwardContext(noise=rows[-1], double_backward=double_backward)
                return self.support_loss(net, theta, support, ctx)

            phi = self._solve(support_loss(double_backward=False), theta)
            query_gradient = torch.func.grad(
                lambda weights: outer.predict(net, params, weights, *rows), has_aux=True
            )
            grads, extras = query_gradient(phi)
            grads = self._implicit(support_loss(double_backward=True), phi, grads)
            return add_prefix("net.", grads), extras

        return task

    def outer_gradients(self, task: TaskFunction, rows: tuple[Tensor, ...]) -> tuple[Params, Any]:
        params: Params = {**self.optimizer.targets}
        grads, extras = self.resolved_engine().map(task, self.net, params, rows)
        return {name: grad.mean(0) for name, grad in grads.items()}, extras

    def _solve(self, loss: Loss, theta: Params) -> Params:
        """Return the adapted parameters phi in training, without a graph."""
        throughout = self.proximal == "each_step"
        objective = _with_proximal(loss, theta, self.lam) if throughout else loss
        phi = sgd_adapt(
            objective, theta, lr=self.inner_lr, steps=self.inner_steps, first_order=True
        )
        if throughout:
            return phi
        kept = 1.0 - self.inner_lr * self.lam
        return {name: theta[name] + kept * (phi[name] - theta[name]) for name in theta}

    def _implicit(self, loss: Loss, phi: Params, grads: Params) -> Params:
        """Return the meta-gradient of a task, given the gradient of its query loss at phi."""
        if self.cg_steps <= 1:
            return grads

        def slope(vector: Tensor) -> Tensor:
            return flatten(torch.func.grad(loss)(unflatten(vector, phi)))

        # The Hessian is symmetric: the vector-Hessian product of a backward pass equals H v.
        pullback = torch.func.vjp(slope, flatten(phi))[1]

        def matrix_times(vector: Tensor) -> Tensor:
            image: Tensor = pullback(vector)[0]
            return (1.0 + self.cg_damping) * vector + image / (self.lam + self.lam_damping)

        solution = conjugate_gradients(matrix_times, flatten(grads), self.cg_steps)
        return unflatten(solution, phi)

    def path(self, net: nn.Module, theta: Params, support: Support, steps: int) -> list[Params]:
        ctx = ForwardContext(running=self.bn == "running")
        loss = self.support_loss(net, theta, support, ctx)
        objective = _with_proximal(loss, theta, self.eval_lam) if self.eval_lam else loss
        path = sgd_path(objective, theta, lr=self.inner_lr, steps=steps, first_order=True)
        return [theta, *path]


def conjugate_gradients(
    matrix_times: Callable[[Tensor], Tensor],
    target: Tensor,
    steps: int,
    tolerance: float = _TOLERANCE,
) -> Tensor:
    """Solve A x = b for a positive definite A by conjugate gradients (Hestenes & Stiefel 1952).

    The solution no longer changes once the squared residual is below `tolerance`.

    Args:
        matrix_times: Function from a vector v, (P,), to A v.
        target: Right-hand side b, (P,).
        steps: Number of steps from x = 0; P steps reach the exact solution.
        tolerance: Squared residual below which the solver stops.

    Returns:
        Solution x, (P,).
    """
    solution = torch.zeros_like(target)
    residual = direction = target
    square = residual @ residual
    active = square > 0.0
    for _ in range(steps):
        image = matrix_times(direction)
        size = torch.where(active, square / (direction @ image), 0.0)
        solution = solution + size * direction
        residual = residual - size * image
        before, square = square, residual @ residual
        active = active & (square >= tolerance)
        direction = residual + torch.where(active, square / before, 0.0) * direction
    return solution


def _with_proximal(loss: Loss, start: Params, lam: float) -> Loss:
    """Return a loss plus lam / 2 times the squared distance to the start of adaptation."""
    center = {name: param.detach() for name, param in start.items()}

    def objective(params: Params) -> Tensor:
        distances = [(params[n] - center[n]).square().sum() for n in params]
        return loss(params) + 0.5 * lam * torch.stack(distances).sum()

    return objective
