"""La-MAML: look-ahead MAML for learning online (Gupta, Yadav & Paull 2020).

Official code: montrealrobotics/La-MAML. Shapes: B rows of a step, M rows of a memory.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import forward, positive
from metarun.algorithms.common.online import OnlineLearner
from metarun.algorithms.common.update_strategies import Replay, State, Step, draw_key
from metarun.algorithms.functional import Params, add_prefix, gradient, strip_prefix
from metarun.algorithms.outer_optimizer import check_positive
from metarun.backbones.layers.context import ForwardContext
from metarun.core import seeding

_SLOT_ORDER = 34


class LaMAML(OnlineLearner):
    """Meta-learns, along the stream, weights and their learning rates that agree with the past.

    For each step of the stream, `glances` times: the incoming rows, in random order, are learned
    one by one from the weights, each by a step w <- w - relu(a) * gradient with a rate a for
    every weight; the meta-loss is the mean, over the weights after each of them, of the loss on
    the incoming and `replayed` remembered rows; its gradient moves the rates by `rates_lr`, then
    the weights by the new rates (Gupta et al. 2020, Algorithm 1, eq. 5-7). C-MAML and Sync
    La-MAML are the same with `step=fixed`, without and with learned rates.

    As in the code, inner gradients are constants unless `second_order`, gradients of the
    weights and of the rates are each cut to the norm `clip_norm`, and "the memory of old tasks"
    is the memory itself, since it is one list there. Rows join it after their last glance (in
    the code in the first), so that what is replayed is never among what is incoming.

    Args:
        rates: Whether the rates are `learned`, or `fixed` at their start.
        rates_start: Start of every rate.
        rates_lr: Learning rate of the rates.
        step: What moves the weights: the learned `rates`, or a `fixed` rate.
        step_lr: That rate.
        glances: Meta-updates for each step of the stream.
        memory: Rows remembered.
        replayed: Of them in a meta-loss.
        clip_norm: Largest norm of a gradient.
        second_order: Differentiate inner gradients.
        **common: Those of `Algorithm`.

    Raises:
        ValueError: A number or a word is out of range, or the backbone has batch norm.
    """

    def __init__(
        self,
        *,
        rates: Literal["learned", "fixed"] = "learned",
        rates_start: float = 0.15,
        rates_lr: float = 0.3,
        step: Literal["rates", "fixed"] = "rates",
        step_lr: float = 0.1,
        glances: int = 5,
        memory: int = 200,
        replayed: int = 10,
        clip_norm: float = 2.0,
        second_order: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if rates not in ("learned", "fixed"):
            raise ValueError(f"algo.rates={rates}: expected learned or fixed")
        if step not in ("rates", "fixed"):
            raise ValueError(f"algo.step={step}: expected rates or fixed")
        for name, value in (
            ("rates_start", rates_start),
            ("rates_lr", rates_lr),
            ("step_lr", step_lr),
            ("clip_norm", clip_norm),
        ):
            check_positive(f"algo.{name}", value)
        positive("glances", glances)
        self.rates = rates
        self.rates_start = rates_start
        self.rates_lr = rates_lr
        self.moves = step
        self.step_lr = step_lr
        self.glances = glances
        self.clip_norm = clip_norm
        self.second_order = second_order
        self.reservoir = Replay(glances, memory, replayed)
        self.net = self.made()

    def begin(self, theta: Params, x: Tensor, y: Tensor) -> State:
        rates = {name: torch.full_like(value, self.rates_start) for name, value in theta.items()}
        return {
            **add_prefix("weights.", theta),
            **add_prefix("rates.", rates),
            "key": self.rollout_key(),
            **self.reservoir.begin(theta, x, y),
        }

    def learn(
        self,
        net: nn.Module,
        theta: Params,  # noqa: ARG002
        state: State,
        x: Tensor,
        y: Tensor,
        step: Step,
    ) -> State:
        for glance in range(self.glances):
            key = draw_key(state, step, glance, x.device)
            order = seeding.choose(key, _SLOT_ORDER, len(x), len(x))
            # Remembered rows first, since those of the step itself join the memory after it.
            bx, by = self.reservoir.rows(state, x, y, step, glance)
            state = self._glance(net, state, x[order], y[order], bx, by)
        return self.reservoir.leave(state, x, y, step)

    def _glance(
        self, net: nn.Module, state: State, x: Tensor, y: Tensor, bx: Tensor, by: Tensor
    ) -> State:
        """The state after one meta-update on rows (B, …), judged by rows b."""
        learned = {n: v for n, v in state.items() if n.startswith(("weights.", "rates."))}

        def meta_loss(learned: Params) -> Tensor:
            fast, rates = strip_prefix("weights.", learned), strip_prefix("rates.", learned)
            losses = []
            for row in range(len(x)):
                fast = self._look_ahead(net, fast, rates, x[row : row + 1], y[row : row + 1])
                losses.append(self.loss(forward(net, fast, bx, ForwardContext()), by))
            return torch.stack(losses).mean()

        grads = torch.func.grad(meta_loss)(learned)
        weights, rates = strip_prefix("weights.", state), strip_prefix("rates.", state)
        of_weights = self._clipped(strip_prefix("weights.", grads))
        of_rates = self._clipped(strip_prefix("rates.", grads))
        if self.rates == "learned":
            rates = {name: rate - self.rates_lr * of_rates[name] for name, rate in rates.items()}
        moved = {
            name: weight
            - (rates[name].relu() if self.moves == "rates" else self.step_lr) * of_weights[name]
            for name, weight in weights.items()
        }
        return {**state, **add_prefix("weights.", moved), **add_prefix("rates.", rates)}

    def _look_ahead(
        self, net: nn.Module, fast: Params, rates: Params, x: Tensor, y: Tensor
    ) -> Params:
        """The weights after a step on one row, differentiable by the weights and the rates."""
        grads = gradient(
            lambda weights: self.loss(forward(net, weights, x, ForwardContext()), y),
            fast,
            first_order=not self.second_order,
        )
        return {name: value - rates[name].relu() * grads[name] for name, value in fast.items()}

    def _clipped(self, grads: Params) -> Params:
        """The gradients, scaled down to the largest norm together."""
        norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
        scale = self.clip_norm / norm.clamp(min=self.clip_norm)
        return {name: grad * scale for name, grad in grads.items()}
