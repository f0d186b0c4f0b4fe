"""Adam and SGD, by torch's functions for them.

`torch.optim.Adam` and `torch.optim.SGD` are classes around the same functions. To make one imports
torch's compiler, which takes a second, and a step of a few small tensors takes twice as long.
Around Adam's operator there is another function, which sorts parameters by device and precision:
here all have the same ones. State has the format of the classes, so that it can be exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.sgd import sgd

_State = dict[int, dict[str, Tensor]]

_EPS = 1e-8
_MOMENTS = ("exp_avg", "exp_avg_sq")


class UpdateRule(Protocol):
    """An update of parameters by their gradients, with a state for each parameter.

    Attributes:
        state: Tensors by name, by the position of the parameter; empty before the first update.
    """

    state: _State

    def step(self, params: Sequence[Tensor], grads: Sequence[Tensor], lr: float) -> None:
        """Change the parameters in place; gradients have their shapes and layouts."""
        ...

    # The same update as a pure function, for a compiler. It agrees up to rounding.

    @property
    def settings(self) -> tuple[float, ...]:
        """All that `moved` depends on besides its arguments."""
        ...

    def moments(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors of the state that `moved` changes, zeros before the first update."""
        ...

    def factors(self, rates: Sequence[float]) -> Tensor:
        """Return the numbers (K, F) that `moved` needs in the next K updates.

        Args:
            rates: Learning rate of each update.
        """
        ...

    def moved(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        moments: Sequence[Tensor],
        factors: Tensor,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return parameters and moments after an update.

        Args:
            params, grads: See `step`.
            moments: Tensors as from `moments`.
            factors: Numbers (F,) of this update.
        """
        ...

    def take(self, params: Sequence[Tensor], moments: Sequence[Tensor], updates: int) -> None:
        """Take over the moments after a number of updates."""
        ...


@dataclass
class Adam:
    """Adam (Kingma & Ba 2015); arguments as those of `torch.optim.Adam`."""

    betas: tuple[float, float]
    weight_decay: float
    state: _State = field(default_factory=dict)

    def step(self, params: Sequence[Tensor], grads: Sequence[Tensor], lr: float) -> None:
        """See `UpdateRule.step`."""
        if not params:
            return
        self.moments(params)
        own = [self.state[position] for position in range(len(params))]
        steps = [state["step"] for state in own]
        with torch.no_grad():
            torch._foreach_add_(steps, 1)
            torch._fused_adam_(
                list(params),
                list(grads),
                [state["exp_avg"] for state in own],
                [state["exp_avg_sq"] for state in own],
                [],
                steps,
                amsgrad=False,
                lr=lr,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=self.weight_decay,
                eps=_EPS,
                maximize=False,
            )

    @property
    def settings(self) -> tuple[float, ...]:
        """See `UpdateRule.settings`."""
        return (*self.betas, self.weight_decay)

    def moments(self, params: Sequence[Tensor]) -> list[Tensor]:
        """See `UpdateRule.moments`: first all first moments, then all second ones."""
        if not self.state:
            for position, param in enumerate(params):
                count = torch.zeros((), dtype=torch.float32, device=param.device)
                zeros = {name: torch.zeros_like(param) for name in _MOMENTS}
                self.state[position] = {"step": count, **zeros}
        return [self.state[i][name] for name in _MOMENTS for i in range(len(params))]

    def factors(self, rates: Sequence[float]) -> Tensor:
        """See `UpdateRule.factors`: the rate and the root that correct the moments' bias."""
        done = int(self.state[0]["step"])
        rows = []
        for count, rate in enumerate(rates, done + 1):
            first, second = (1.0 - beta**count for beta in self.betas)
            rows.append((rate / first, math.sqrt(second)))
        return torch.tensor(rows, dtype=torch.float64)

    def moved(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        moments: Sequence[Tensor],
        factors: Tensor,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See `UpdateRule.moved`."""
        rate, root = factors.unbind()
        firsts, seconds, after = [], [], []
        old = zip(params, grads, moments[: len(params)], moments[len(params) :], strict=True)
        for param, grad, first, second in old:
            decayed = grad + self.weight_decay * param if self.weight_decay else grad
            firsts.append(self.betas[0] * first + (1.0 - self.betas[0]) * decayed)
            seconds.append(self.betas[1] * second + (1.0 - self.betas[1]) * decayed.square())
            after.append(param - rate * firsts[-1] / (seconds[-1].sqrt() / root + _EPS))
        return after, [*firsts, *seconds]

    def take(self, params: Sequence[Tensor], moments: Sequence[Tensor], updates: int) -> None:
        """See `UpdateRule.take`."""
        torch._foreach_copy_(self.moments(params), list(moments))
        torch._foreach_add_([self.state[i]["step"] for i in range(len(params))], updates)


@dataclass
class SGD:
    """Stochastic gradient descent; arguments as those of `torch.optim.SGD`."""

    momentum: float
    weight_decay: float
    state: _State = field(default_factory=dict)

    def step(self, params: Sequence[Tensor], grads: Sequence[Tensor], lr: float) -> None:
        """See `UpdateRule.step`."""
        buffers: list[Any] = [
            self.state.get(position, {}).get("momentum_buffer") for position in range(len(params))
        ]
        with torch.no_grad():
            sgd(
                list(params),
                list(grads),
                buffers,
                weight_decay=self.weight_decay,
                momentum=self.momentum,
                lr=lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
        if self.momentum:
            self.state = {i: {"momentum_buffer": buffer} for i, buffer in enumerate(buffers)}

    @property
    def settings(self) -> tuple[float, ...]:
        """See `UpdateRule.settings`."""
        return (self.momentum, self.weight_decay)

    def moments(self, params: Sequence[Tensor]) -> list[Tensor]:
        """See `UpdateRule.moments`: the momentum of each parameter."""
        if self.momentum and not self.state:
            self.state = {
                i: {"momentum_buffer": torch.zeros_like(param)} for i, param in enumerate(params)
            }
        return [own["momentum_buffer"] for own in self.state.values()]

    def factors(self, rates: Sequence[float]) -> Tensor:
        """See `UpdateRule.factors`: the rate."""
        return torch.tensor(rates, dtype=torch.float64)[:, None]

    def moved(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        moments: Sequence[Tensor],
        factors: Tensor,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See `UpdateRule.moved`."""
        moves = [
            grad + self.weight_decay * param if self.weight_decay else grad
            for param, grad in zip(params, grads, strict=True)
        ]
        if self.momentum:
            moves = [self.momentum * old + move for old, move in zip(moments, moves, strict=True)]
        after = [param - factors[0] * move for param, move in zip(params, moves, strict=True)]
        return after, moves if self.momentum else []

    def take(
        self,
        params: Sequence[Tensor],
        moments: Sequence[Tensor],
        updates: int,  # noqa: ARG002
    ) -> None:
        """See `UpdateRule.take`."""
        if self.momentum:
            torch._foreach_copy_(self.moments(params), list(moments))


def loaded(state: _State, params: Sequence[Tensor]) -> _State:
    """Return a copy of a stored state on the devices and in the precisions of the parameters."""
    return {
        position: {
            name: tensor.detach().to(
                device=params[position].device,
                # Steps are counted in float32, however precise the parameters are.
                dtype=torch.float32 if name == "step" else params[position].dtype,
                copy=True,
            )
            for name, tensor in own.items()
        }
        for position, own in state.items()
    }
