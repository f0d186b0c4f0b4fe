"""The outer optimizer, which averages, checks, clips and applies all meta-gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.update_rules import SGD, Adam, UpdateRule, loaded
from metarun.backbones.layers.normalization import move_running_statistics
from metarun.core import distributed
from metarun.core.checks import at_least, positive, within
from metarun.core.types import Progress

Method = Literal["adam", "sgd"]
Schedule = Literal["constant", "linear", "cosine", "step"]


class NonFiniteError(ArithmeticError):
    """A loss or a gradient is infinite or not a number; the parameters are unchanged.

    Attributes:
        name: Description of the quantity: `loss`, or the gradient of a named parameter.
        value: Non-finite value.
        clip_norm: Bound of the gradient's norm that was set; None without one.
    """

    def __init__(self, name: str, value: float, clip_norm: float | None = None) -> None:
        super().__init__(f"{name} is {value}")
        self.name = name
        self.value = value
        self.clip_norm = clip_norm


class OuterOptimizer(nn.Module):
    """An optimizer of named parameters, with a learning-rate schedule over the run.

    Frozen parameters, those with `requires_grad=False`, are left out. There may be none at all, as
    with ProtoNet on features as they are. Its state is part of the
    `state_dict` of the algorithm that owns it.

    Args:
        parameters: Pairs of name and parameter, as from `named_parameters()`.
        method: Update rule, `adam` (Kingma & Ba 2015) or `sgd`.
        lr: Outer learning rate; for Reptile, the interpolation step.
        betas: Decay rates of Adam's moments.
        momentum: Momentum of `sgd`.
        weight_decay: Factor of the L2 penalty's gradient, which is added to the gradient.
        schedule: Schedule of the learning rate: `constant`; `linear` to 0 or `cosine` to `min_lr`
            at the end of the run; `step` multiplies by `step_factor` every `step_every` updates.
        min_lr: Final learning rate of `cosine`.
        step_every: Number of updates between two reductions of `step`.
        step_factor: Factor of each reduction of `step`.
        clip_value: Bound that clamps each gradient element to [-clip_value, clip_value].
        clip_norm: Largest Euclidean norm of the gradient over all parameters; a larger gradient
            is scaled down to it.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        method: Method = "adam",
        lr: float = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        schedule: Schedule = "constant",
        min_lr: float = 0.0,
        step_every: int = 1000,
        step_factor: float = 0.5,
        clip_value: float | None = None,
        clip_norm: float | None = None,
    ) -> None:
        super().__init__()
        positive("optim", lr=lr, step_every=step_every, step_factor=step_factor)
        positive("optim", null="or null", clip_value=clip_value, clip_norm=clip_norm)
        at_least("optim", 0, min_lr=min_lr, weight_decay=weight_decay)
        within("optim", "[0, 1)", momentum=momentum)
        for beta in betas:
            within("optim", "[0, 1)", betas=beta)
        # A plain dict: registered parameters would appear twice in the owner's `parameters()`.
        given = dict(parameters)
        self.targets = {name: param for name, param in given.items() if param.requires_grad}
        if given and not self.targets:
            raise ValueError("all parameters are frozen (requires_grad=False): nothing can learn")
        self.rule: UpdateRule = (
            Adam((betas[0], betas[1]), weight_decay)
            if method == "adam"
            else SGD(momentum, weight_decay)
        )
        self.lr = lr
        self.schedule = schedule
        self.min_lr = min_lr
        self.step_every = step_every
        self.step_factor = step_factor
        self.clip_value = clip_value
        self.clip_norm = clip_norm

    def descend(self, loss: Tensor, progress: Progress) -> None:
        """Differentiate a loss with respect to every parameter and update the parameters.

        Args:
            loss: Mean loss over the tasks of the batch, 0-dimensional, with its graph.
            progress: Number of updates done, and of all updates.

        Raises:
            NonFiniteError: The loss or its gradient is not finite; no state has changed.
        """
        whole = self.averaged({"loss": loss}, progress)["loss"]
        if not torch.isfinite(whole):
            raise NonFiniteError("loss", float(whole.detach()), self.clip_norm)
        names = list(self.targets)
        grads = torch.autograd.grad(
            loss, [self.targets[n] for n in names], allow_unused=True, materialize_grads=True
        )
        self.step(dict(zip(names, grads, strict=True)), progress)

    def step(
        self,
        grads: dict[str, Tensor],
        progress: Progress,
        limit: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> None:
        """Update the parameters with gradients, matched by name.

        Args:
            grads: Gradients by name, each a mean over the tasks of the batch.
            progress: Number of updates done, and of all updates.
            limit: Additional clipping, applied after the gradients are averaged over processes.

        Raises:
            NonFiniteError: A gradient is not finite; no state has changed.
        """
        grads = self.averaged(grads, progress)
        self.move(grads if limit is None else limit(grads), progress)

    def averaged(self, grads: dict[str, Tensor], progress: Progress) -> dict[str, Tensor]:
        """Return gradients averaged over the tasks of all processes, from those of this one."""
        return grads if progress.share is None else distributed.mean(grads, progress.share.count)

    def move(self, grads: dict[str, Tensor], progress: Progress) -> None:
        """Update the parameters as `step` does, with gradients that are already averaged."""
        norm = self.check(grads)
        params, moves = list(self.targets.values()), []
        for name, parameter in self.targets.items():
            grad = self._clip(grads[name], norm)
            if grad.stride() != parameter.stride():
                # The fused update reads memory in order: another layout would permute elements.
                grad = torch.empty_like(parameter).copy_(grad)
            moves.append(grad)
        self.rule.step(params, moves, self.rate(progress))

    def check(self, grads: dict[str, Tensor]) -> Tensor:
        """Return the Euclidean norm of gradients over all parameters, 0-dimensional.

        Raises:
            NonFiniteError: A gradient is not finite.
        """
        assert grads.keys() == self.targets.keys(), "gradients and parameters differ in names"
        norms = torch._foreach_norm(list(grads.values()))
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        if not math.isfinite(norm.item()):
            raise NonFiniteError(*_locate(grads, norm), self.clip_norm)
        return norm

    def rate(self, progress: Progress) -> float:
        """Return the learning rate of the schedule after `progress.step` updates."""
        if self.schedule == "linear":
            return self.lr * (1.0 - progress.fraction)
        if self.schedule == "cosine":
            share = (1.0 + math.cos(math.pi * progress.fraction)) / 2.0
            return self.min_lr + (self.lr - self.min_lr) * share
        if self.schedule == "step":
            return self.lr * self.step_factor ** (progress.step // self.step_every)
        return self.lr

    def _clip(self, grad: Tensor, norm: Tensor) -> Tensor:
        if self.clip_norm is not None:
            grad = grad * (self.clip_norm / norm.clamp(min=self.clip_norm))
        if self.clip_value is not None:
            grad = grad.clamp(-self.clip_value, self.clip_value)
        return grad

    @property
    def settings(self) -> Hashable:
        """All that `moved` depends on besides its arguments."""
        return type(self.rule), self.rule.settings, self.clip_norm, self.clip_value

    def moved(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        moments: Sequence[Tensor],
        factors: Tensor,
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Return parameters and moments after an update as `move`, and the gradient's norm.

        It is a pure function for a compiler; it agrees with `move` up to rounding. If the norm is
        not finite, the others are not to be used. The arguments are those of `UpdateRule.moved`.
        """
        norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
        clipped = [self._clip(grad, norm) for grad in grads]
        after, moved = self.rule.moved(params, clipped, moments, factors)
        return after, moved, norm

    def take(self, params: Sequence[Tensor], moments: Sequence[Tensor], updates: int) -> None:
        """Take over the parameters and moments after a number of updates by `moved`."""
        own: list[Tensor] = [*self.targets.values()]
        with torch.no_grad():
            torch._foreach_copy_(own, list(params))
            self.rule.take(own, moments, updates)

    def get_extra_state(self) -> dict[str, Any]:
        return {"state": self.rule.state}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.rule.state = loaded(state["state"], list(self.targets.values()))


def _locate(grads: dict[str, Tensor], norm: Tensor) -> tuple[str, float]:
    """Return what is not finite, and its value."""
    for name, grad in grads.items():
        bad = grad[~torch.isfinite(grad)]
        if bad.numel():
            return f"the gradient of {name}", float(bad.flatten()[0])
    return "the norm of the gradient", float(norm)


def update_running_statistics(
    net: nn.Module, moments: dict[str, tuple[Tensor, Tensor]], momentum: float | None = None
) -> None:
    """Move the running statistics of every batch norm toward the moments of a forward pass.

    The moments are averaged over the tasks of all processes first, so that the number of tasks
    does not change the size of the move.

    Args:
        net: Network of the forward pass.
        moments: (mean, variance) by buffer name, as collected by `ForwardContext.moments`, with a
            leading dimension of T tasks.
        momentum: Weight of the new moments; None takes that of each layer.
    """
    if not moments:
        return
    count = len(next(iter(moments.values()))[0])
    means = {f"mean {name}": mean.mean(0) for name, (mean, _) in moments.items()}
    means |= {f"var {name}": var.mean(0) for name, (_, var) in moments.items()}
    means = distributed.mean(means, count)
    averaged = {name: (means[f"mean {name}"], means[f"var {name}"]) for name in moments}
    move_running_statistics(net, averaged, momentum)
