"""Adaptation to one task, as pure functions of parameters.

These functions handle a single task; the engine maps them over a batch. `Params` are the adapted
parameters by qualified name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metarun.core.checks import at_least, positive
from metarun.core.types import Progress

Params = dict[str, Tensor]
Loss = Callable[[Params], Tensor]
LossAndExtras = Callable[[Params], tuple[Tensor, Any]]


def check_inner_loop(
    inner_lr: float, inner_steps: int, second_order_from: int | None, *, fewest: int = 0
) -> None:
    """Check the settings of an inner loop of gradient steps.

    Args:
        inner_lr: Inner learning rate.
        inner_steps: Inner steps in training.
        second_order_from: Update from which inner gradients are differentiated; None is never.
        fewest: Smallest allowed number of inner steps.

    Raises:
        ValueError: A setting is out of range.
    """
    positive("algo", inner_lr=inner_lr)
    at_least("algo", fewest, inner_steps=inner_steps)
    at_least("algo", 0, null="or null for never", second_order_from=second_order_from)


def is_first_order(second_order_from: int | None, progress: Progress) -> bool:
    """Return whether an update treats inner gradients as constants; see `check_inner_loop`."""
    return second_order_from is None or progress.step < second_order_from


def strip_prefix(prefix: str, params: Params) -> Params:
    """Return the parameters whose names begin with a prefix, with the prefix removed."""
    return {n.removeprefix(prefix): p for n, p in params.items() if n.startswith(prefix)}


def add_prefix(prefix: str, params: Params) -> Params:
    """Return the parameters with a prefix before their names: the inverse of `strip_prefix`."""
    return {f"{prefix}{name}": param for name, param in params.items()}


def dict_key(name: str) -> str:
    """Return a parameter's name as a key of `nn.ParameterDict`, which does not allow dots."""
    return name.replace(".", "/")


def gradient(loss: Loss, params: Params, *, first_order: bool) -> Params:
    """Return the gradient of a loss with respect to the parameters.

    Args:
        loss: Function of the parameters with a 0-dimensional value.
        params: Point at which the gradient is taken.
        first_order: Whether to treat the gradient as a constant, without a graph.
    """
    grads, _ = gradient_and_extras(lambda p: (loss(p), ()), params, first_order=first_order)
    return grads


def gradient_and_extras(
    loss: LossAndExtras, params: Params, *, first_order: bool
) -> tuple[Params, Any]:
    """Return the gradient, as `gradient` does, and the extras of a function (loss, extras).

    The extras may be any nest of tensors.
    """
    if first_order:
        params = {name: param.detach() for name, param in params.items()}
    grads, extras = torch.func.grad(loss, has_aux=True)(params)
    if first_order:
        grads = {name: grad.detach() for name, grad in grads.items()}
    return grads, extras


def descend(
    params: Params, grads: Params, *, lr: float | Params, clip: float | None = None
) -> Params:
    """Return the parameters after one step of plain gradient descent, theta - lr * grad.

    Args:
        params: Parameters before the step.
        grads: Gradients by the same names.
        lr: Step size in parameter units per unit of gradient; by name where it is learned.
        clip: Bound that clamps each gradient element to [-clip, clip]; None is no bound.
    """
    if clip is not None:
        grads = {name: grad.clamp(-clip, clip) for name, grad in grads.items()}
    return {
        name: param - (lr[name] if isinstance(lr, dict) else lr) * grads[name]
        for name, param in params.items()
    }


def sgd_path(
    loss: Loss,
    params: Params,
    *,
    lr: float | Params,
    steps: int,
    first_order: bool,
    clip: float | None = None,
) -> Iterator[Params]:
    """Yield the parameters after each step of plain gradient descent.

    Applies theta <- theta - lr * grad L(theta): the inner loop of MAML (Finn et al. 2017,
    Algorithm 1, line 6) and, with a rate for each element, of Meta-SGD (Li et al. 2017, eq. 2).

    Args:
        loss: Mean loss over the support rows.
        params: Parameters before the first step.
        lr: Step size in parameter units per unit of gradient; by name where it is learned.
        steps: Number of steps; 0 yields nothing.
        first_order: Whether to treat inner gradients as constants (FOMAML).
        clip: Bound that clamps each gradient element to [-clip, clip]; None is no bound.
    """
    for _ in range(steps):
        grads = gradient(loss, params, first_order=first_order)
        params = descend(params, grads, lr=lr, clip=clip)
        yield params


def sgd_adapt(
    loss: Loss,
    params: Params,
    *,
    lr: float | Params,
    steps: int,
    first_order: bool,
    clip: float | None = None,
) -> Params:
    """Return the last parameters of `sgd_path`; with 0 steps the unchanged parameters."""
    path = sgd_path(loss, params, lr=lr, steps=steps, first_order=first_order, clip=clip)
    for step in path:
        params = step
    return params


def gradient_backwards(
    start: Callable[[Params], Params],
    step: Callable[[Params, Params], Params],
    outcome: Callable[[Params, Params], tuple[Tensor, Any]],
    params: Params,
    *,
    steps: int,
) -> tuple[Params, Any]:
    """Return the gradient of a loss after inner steps, with memory for the graph of one step.

    The steps are first taken without a graph, and the weights after each are kept. From the last
    to the first, each step is then repeated to pull the gradient back through it (Griewank 1992,
    with a checkpoint at each step). The result is exact, like that of `torch.autograd` through
    all steps. The cost is one more forward and backward pass for each step.

    Args:
        start: Function of the parameters that returns the weights before the first step.
        step: Function of (weights, parameters) that returns the weights after one step.
        outcome: Function of (last weights, parameters) that returns (loss, extras), where the
            extras may be any nest of tensors.
        params: Point at which the gradient is taken.
        steps: Number of inner steps.

    Returns:
        Gradient of the loss with respect to each parameter, and the extras.
    """
    params = {name: param.detach() for name, param in params.items()}
    path = [start(params)]
    for _ in range(steps):
        path.append(step(path[-1], params))
    outcome_gradient = torch.func.grad(outcome, argnums=(0, 1), has_aux=True)
    (pulled, grads), extras = outcome_gradient(path.pop(), params)
    while path:
        pull = torch.func.vjp(step, path.pop(), params)[1]
        pulled, more = pull(pulled)
        grads = {name: grad + more[name] for name, grad in grads.items()}
    pull = torch.func.vjp(start, params)[1]
    (more,) = pull(pulled)
    return {name: grad + more[name] for name, grad in grads.items()}, extras


def with_gradient(params: Params, grads: Params) -> Tensor:
    """Return a 0-dimensional tensor whose gradient by the parameters is the given one."""
    return torch.stack([(params[n] * grad.detach()).sum() for n, grad in grads.items()]).sum()


def flatten(params: Params) -> Tensor:
    """Return all parameters as one vector, in the order of the dictionary."""
    return torch.cat([param.reshape(-1) for param in params.values()])


def unflatten(vector: Tensor, like: Params) -> Params:
    """Return the inverse of `flatten`, with the names, shapes and order of `like`."""
    parts = vector.split([param.numel() for param in like.values()])
    return {n: part.view(p.shape) for (n, p), part in zip(like.items(), parts, strict=True)}


@dataclass(frozen=True, slots=True)
class AdamState:
    """Moments of Adam by parameter name, and the number of updates done (0-dimensional)."""

    first: Params
    second: Params
    count: Tensor


def adam_step(
    params: Params,
    grads: Params,
    state: AdamState,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float = 1e-8,
) -> tuple[Params, AdamState]:
    """Return the parameters and the state after one update of Adam.

    This is Algorithm 1 of Kingma & Ba 2015 in the form at the end of section 2. The bias
    correction is part of the rate, and `eps` is added to the uncorrected root. TensorFlow and
    therefore the official code of Reptile do the same.

    Args:
        params: Parameters before the update.
        grads: Gradients by the same names.
        state: Moments and count before the update.
        lr: Step size.
        betas: Decay rates of the first and the second moments.
        eps: Constant added to the root of the second moment.
    """
    count = state.count + 1
    first = {n: betas[0] * state.first[n] + (1 - betas[0]) * g for n, g in grads.items()}
    second = {n: betas[1] * state.second[n] + (1 - betas[1]) * g * g for n, g in grads.items()}
    rate = lr * torch.sqrt(1 - betas[1] ** count) / (1 - betas[0] ** count)
    moved = {n: p - rate * first[n] / (second[n].sqrt() + eps) for n, p in params.items()}
    return moved, AdamState(first, second, count)


def adam_start(params: Params) -> AdamState:
    """Return the state of Adam before the first update: zero moments and a count of 0."""
    zeros = {name: torch.zeros_like(param) for name, param in params.items()}
    some = next(iter(params.values()))
    return AdamState(zeros, dict(zeros), torch.zeros((), dtype=some.dtype, device=some.device))


def prototypes(features: Tensor, labels: Tensor, ways: int) -> Tensor:
    """Return the mean feature vector of each class, (W, F) (Snell et al. 2017, eq. 1).

    Args:
        features: Support features, (S, F).
        labels: Support labels, (S,); every class occurs.
        ways: Number of classes, W.
    """
    member = (labels[None] == torch.arange(ways, device=labels.device)[:, None]).to(features.dtype)
    return (member @ features) / member.sum(1, keepdim=True)
