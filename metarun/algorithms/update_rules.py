"""Adam and SGD, by torch's functions for them.

`torch.optim.Adam` and `torch.optim.SGD` are classes around the same functions. To make one imports
torch's compiler, which takes a second, and a step of a few small tensors takes twice as long.
Around Adam's operator there is another function, which sorts parameters by device and precision:
here all have the same ones. State has the format of the classes, so that it can be exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.sgd import sgd

_State = dict[int, dict[str, Tensor]]


class UpdateRule(Protocol):
    """An update of parameters by their gradients, with a state for each parameter.

    Attributes:
        state: Tensors by name, by the position of the parameter; empty before the first update.
    """

    state: _State

    def step(self, params: Sequence[Tensor], grads: Sequence[Tensor], lr: float) -> None:
        """Change the parameters in place; gradients have their shapes and layouts."""
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
        if not self.state:
            for position, param in enumerate(params):
                count = torch.zeros((), dtype=torch.float32, device=param.device)
                moments = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
                self.state[position] = {"step": count, **moments}
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
                eps=1e-8,
                maximize=False,
            )


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
