"""Implicit MAML (Rajeswaran, Finn, Kakade & Levine 2019; code aravindr93/imaml_dev).

Shapes: T tasks, S support rows, Q query rows, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import forward, own_parameters, task_metric
from metarun.algorithms.common.adapting import AdaptingLearner
from metarun.algorithms.functional import Loss, Params, flatten, sgd_adapt, sgd_path, unflatten
from metarun.algorithms.outer_optimizer import check_positive, update_running_statistics
from metarun.backbones.layers.context import ForwardContext
from metarun.core.types import Metrics, Progress, TaskBatch

Proximal = Literal["after", "each_step"]

# Once the squared residual is below it the solve has ended, as in the code.
_TOLERANCE = 1e-10


class IMAML(AdaptingLearner):
    """Differentiates the point where adaptation ends, not the path that led to it.

    Adaptation solves phi = argmin L(phi; support) + lam / 2 |phi - theta|^2 (eq. 3), so that the
    meta-gradient is (I + H / lam)^-1 grad L(phi; query) with H the Hessian of the support loss
    at phi (Lemma 1). It is found by conjugate gradients from products with H (Algorithm 2):
    memory does not grow with the inner steps.

    The code differs from the paper, and the defaults are the code's. It takes plain gradient
    steps, then one on lam / 2 |phi - theta|^2 alone; `proximal=each_step` has that term in
    every step, as the paper does. It solves ((1 + cg_damping) I + H / (lam + lam_damping)) v = g
    where the paper has `cg_damping=0 lam_damping=0`. Its evaluation has no proximal term,
    and with `eval_lam` one in every step. Its outer Adam has eps=1e-3, ours torch's 1e-8.

    Args:
        inner_lr: Inner learning rate.
        inner_steps: Gradient steps in training; the step after them is not counted.
        lam: Strength of the proximal term.
        proximal: Where it acts in training: `after` the steps, or in `each_step`.
        eval_lam: Its strength at evaluation.
        cg_steps: Conjugate-gradient steps; with 1 or 0 the gradient at phi is taken as it is,
            as in the code.
        cg_damping: Added to the unit matrix.
        lam_damping: Added to `lam` in the matrix alone.
        **common: Those of `Algorithm`.

    Raises:
        ValueError: A number or a word is out of range.
    """

    def __init__(
        self,
        *,
        inner_lr: float = 0.1,
        inner_steps: int = 16,
        lam: float = 2.0,
        proximal: Proximal = "after",
        eval_lam: float = 0.0,
        cg_steps: int = 5,
        cg_damping: float = 1.0,
        lam_damping: float = 10.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        for name, value in (("inner_lr", inner_lr), ("lam", lam)):
            check_positive(f"algo.{name}", value)
        for name, value in (
            ("inner_steps", inner_steps),
            ("eval_lam", eval_lam),
            ("cg_steps", cg_steps),
            ("cg_damping", cg_damping),
            ("lam_damping", lam_damping),
        ):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"algo.{name}={value}: expected 0 or more")
        for name, value in (("lam", lam), ("eval_lam", eval_lam)):
            if inner_lr * value >= 2.0:
                raise ValueError(
                    f"algo.{name}={value}: expected less than 2 / algo.inner_lr={2 / inner_lr:g}, "
                    "from where on the proximal term drives away from the start"
                )
        if proximal not in ("after", "each_step"):
            raise ValueError(f"algo.proximal={proximal}: expected after or each_step")
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.lam = lam
        self.proximal = proximal
        self.eval_lam = eval_lam
        self.cg_steps = cg_steps
        self.cg_damping = cg_damping
        self.lam_damping = lam_damping
        self.net = self.build_network(self.spec.output_dim)
        self.optimizer = self.build_optimizer()

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        def task(net: nn.Module, theta: Params, *rows: Tensor) -> Any:
            support_x, support_y, query_x, query_y, noise = rows

            def support_loss(params: Params, *, double_backward: bool = False) -> Tensor:
                ctx = ForwardContext(noise=noise, double_backward=double_backward)
                return self.loss(forward(net, params, support_x, ctx), support_y)

            def query_loss(params: Params) -> tuple[Tensor, Any]:
                moments: dict[str, tuple[Tensor, Tensor]] = {}
                ctx = ForwardContext(moments=moments, noise=noise)
                outputs = forward(net, params, query_x, ctx)
                loss = self.loss(outputs, query_y)
                return loss, (loss, outputs, moments)

            phi = self._solve(support_loss, theta)
            grads, extras = torch.func.grad(query_loss, has_aux=True)(phi)
            return self._implicit(partial(support_loss, double_backward=True), phi, grads), extras

        grads, (losses, outputs, moments) = self.resolved_engine().map(
            task, self.net, own_parameters(self.net), self.training_rows(batch, progress)
        )
        self.optimizer.step({f"net.{name}": g.mean(0) for name, g in grads.items()}, progress)
        update_running_statistics(self.net, moments)
        score = task_metric(self.spec, outputs, batch.query_y)
        return {"loss": losses.mean(), self.spec.metric: score.mean()}

    def _solve(self, loss: Loss, theta: Params) -> Params:
        """The adapted parameters in training, without a graph."""
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
        """The meta-gradient of a task from the gradient of its query loss at phi."""
        if self.cg_steps <= 1:
            return grads

        def slope(vector: Tensor) -> Tensor:
            return flatten(torch.func.grad(loss)(unflatten(vector, phi)))

        # The Hessian is symmetric: its rows, which one backward pass gives, are its columns.
        pullback = torch.func.vjp(slope, flatten(phi))[1]

        def matrix_times(vector: Tensor) -> Tensor:
            image: Tensor = pullback(vector)[0]
            return (1.0 + self.cg_damping) * vector + image / (self.lam + self.lam_damping)

        solution = conjugate_gradients(matrix_times, flatten(grads), self.cg_steps)
        return unflatten(solution, phi)

    def path(self, net: nn.Module, theta: Params, x: Tensor, y: Tensor, steps: int) -> list[Params]:
        """The parameters before and after each inner step at evaluation."""

        def loss(params: Params) -> Tensor:
            return self.loss(
                forward(net, params, x, ForwardContext(running=self.bn == "running")), y
            )

        objective = _with_proximal(loss, theta, self.eval_lam) if self.eval_lam else loss
        path = sgd_path(objective, theta, lr=self.inner_lr, steps=steps, first_order=True)
        return [theta, *path]


def conjugate_gradients(
    matrix_times: Callable[[Tensor], Tensor],
    target: Tensor,
    steps: int,
    tolerance: float = _TOLERANCE,
) -> Tensor:
    """Solve A x = b from products with a positive definite A (Hestenes & Stiefel 1952).

    It stays where it is once the squared residual is below `tolerance`.

    Args:
        matrix_times: A times a (P,) vector.
        target: b, (P,).
        steps: Number of steps from x = 0; P of them reach the solution.
        tolerance: Squared residual at which the solve has ended.
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
    """A loss plus lam / 2 times the squared distance to where adaptation starts."""
    center = {name: param.detach() for name, param in start.items()}

    def objective(params: Params) -> Tensor:
        distances = [(params[n] - center[n]).square().sum() for n in params]
        return loss(params) + 0.5 * lam * torch.stack(distances).sum()

    return objective
