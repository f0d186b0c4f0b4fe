"""Adaptation to one task, as pure functions of parameters.

Nothing here knows of a batch of tasks: the engine maps these functions over it. `Params` are
the adapted parameters by qualified name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metarun.algorithms.outer_optimizer import check_positive
from metarun.core.types import Progress

Params = dict[str, Tensor]
Loss = Callable[[Params], Tensor]
LossAndExtras = Callable[[Params], tuple[Tensor, Any]]


def check_inner_loop(
    inner_lr: float, inner_steps: int, second_order_from: int | None, *, fewest: int = 0
) -> None:
    """Refuse settings that no inner loop of gradient steps can have.

    Args:
        inner_lr: Inner learning rate.
        inner_steps: Inner steps in training.
        second_order_from: Update from which inner gradients are differentiated; None is never.
        fewest: Least number of inner steps.

    Raises:
        ValueError: One is out of range.
    """
    check_positive("algo.inner_lr", inner_lr)
    if inner_steps < fewest:
        raise ValueError(f"algo.inner_steps={inner_steps}: expected {fewest} or more")
    if second_order_from is not None and second_order_from < 0:
        raise ValueError(
            f"algo.second_order_from={second_order_from}: expected an update, or null for never"
        )


def is_first_order(second_order_from: int | None, progress: Progress) -> bool:
    """Whether an update takes inner gradients as constants; see `check_inner_loop`."""
    return second_order_from is None or progress.step < second_order_from


def strip_prefix(prefix: str, params: Params) -> Params:
    """The parameters whose names begin with a prefix, by their names below it."""
    return {n.removeprefix(prefix): p for n, p in params.items() if n.startswith(prefix)}


def add_prefix(prefix: str, params: Params) -> Params:
    """The parameters with a prefix before their names: the inverse of `strip_prefix`."""
    return {f"{prefix}{name}": param for name, param in params.items()}


def dict_key(name: str) -> str:
    """A parameter's name as a key of `nn.ParameterDict`, which allows no dots."""
    return name.replace(".", "/")


def gradient(loss: Loss, params: Params, *, first_order: bool) -> Params:
    """Gradient of a loss by the parameters.

    Args:
        loss: 0-dimensional loss of parameters.
        params: Where to take it.
        first_order: Treat the gradient as a constant, and keep no graph of it.
    """
    grads, _ = gradient_and_extras(lambda p: (loss(p), ()), params, first_order=first_order)
    return grads


def gradient_and_extras(
    loss: LossAndExtras, params: Params, *, first_order: bool
) -> tuple[Params, Any]:
    """As `gradient`, of a loss that comes with any nest of tensors beside it, and that nest."""
    if first_order:
        params = {name: param.detach() for name, param in params.items()}
    grads, extras = torch.func.grad(loss, has_aux=True)(params)
    if first_order:
        grads = {name: grad.detach() for name, grad in grads.items()}
    return grads, extras


def descend(
    params: Params, grads: Params, *, lr: float | Params, clip: float | None = None
) -> Params:
    """One step of plain gradient descent: theta - lr * grad.

    Args:
        params: Where to start.
        grads: Gradients by the same names.
        lr: Step size in parameter units per unit of gradient; by name where it is learned.
        clip: Cut each element of a gradient to [-clip, clip].
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
    """The parameters after each step of plain gradient descent.

    Applies theta <- theta - lr * grad L(theta): the inner loop of MAML (Finn et al. 2017,
    Algorithm 1, line 6) and, with a rate for each element, of Meta-SGD (Li et al. 2017, eq. 2).

    Args:
        loss: Mean loss over the support rows.
        params: Where to start.
        lr: Step size in parameter units per unit of gradient; by name where it is learned.
        steps: Number of updates; 0 yields nothing.
        first_order: Treat inner gradients as constants (FOMAML).
        clip: Cut each element of a gradient to [-clip, clip].
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
    """The last of `sgd_path`; with 0 steps the parameters as they came."""
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
    """Gradient of what inner steps lead to, in the memory of one of them and the weights of all.

    The steps are taken without a graph. From the last to the first each is then made again by
    itself, to pull the gradient back through it (Griewank 1992, with a checkpoint at each step).
    Exact, as `torch.autograd` through all steps is; it takes one more forward and backward pass
    for each.

    Args:
        start: The weights before the first step, of the parameters.
        step: The weights after a step, of those before it and of the parameters.
        outcome: Loss, and any nest of tensors beside it, of the last weights and the parameters.
        params: Where to take the gradient.
        steps: How many.

    Returns:
        The gradient of the loss by each of the parameters, and the nest.
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
    """A number whose gradient by the parameters is the given one."""
    return torch.stack([(params[n] * grad.detach()).sum() for n, grad in grads.items()]).sum()


def flatten(params: Params) -> Tensor:
    """All parameters as one vector, in their order."""
    return torch.cat([param.reshape(-1) for param in params.values()])


def unflatten(vector: Tensor, like: Params) -> Params:
    """The inverse of `flatten`: names, shapes and order are those of `like`."""
    parts = vector.split([param.numel() for param in like.values()])
    return {n: part.view(p.shape) for (n, p), part in zip(like.items(), parts, strict=True)}


@dataclass(frozen=True, slots=True)
class AdamState:
    """Moments of Adam by parameter name, and the number of updates made (0-dimensional)."""

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
    """One update of Adam (Kingma & Ba 2015, Algorithm 1, in the form of its section 2's end).

    The bias correction is folded into the rate and `eps` is added to the uncorrected root, as
    TensorFlow does and so the code of Reptile.
    """
    count = state.count + 1
    first = {n: betas[0] * state.first[n] + (1 - betas[0]) * g for n, g in grads.items()}
    second = {n: betas[1] * state.second[n] + (1 - betas[1]) * g * g for n, g in grads.items()}
    rate = lr * torch.sqrt(1 - betas[1] ** count) / (1 - betas[0] ** count)
    moved = {n: p - rate * first[n] / (second[n].sqrt() + eps) for n, p in params.items()}
    return moved, AdamState(first, second, count)


def adam_start(params: Params) -> AdamState:
    """Zero moments."""
    zeros = {name: torch.zeros_like(param) for name, param in params.items()}
    some = next(iter(params.values()))
    return AdamState(zeros, dict(zeros), torch.zeros((), dtype=some.dtype, device=some.device))


def prototypes(features: Tensor, labels: Tensor, ways: int) -> Tensor:
    """(W, F) mean of the (S, F) features of each class (Snell 2017, eq. 1); each has a row."""
    member = (labels[None] == torch.arange(ways, device=labels.device)[:, None]).to(features.dtype)
    return (member @ features) / member.sum(1, keepdim=True)
