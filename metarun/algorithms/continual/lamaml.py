"""La-MAML: look-ahead MAML for online learning (Gupta, Yadav & Paull 2020).

Official code: montrealrobotics/La-MAML. Shapes: B rows of a step.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup, forward
from metarun.algorithms.common.online import OnlineLearner
from metarun.algorithms.common.update_strategies import Replay, State, Step, draw_key
from metarun.algorithms.functional import Params, add_prefix, gradient, strip_prefix
from metarun.backbones.layers.context import ForwardContext
from metarun.core import seeding
from metarun.core.checks import at_least, positive

_SLOT_ORDER = 34


class LaMAML(OnlineLearner):
    """Meta-learns weights and learning rates along the stream, with a memory of earlier rows.

    Each step of the stream has `glances` meta-updates. A meta-update takes the incoming rows one
    by one in random order. Each row makes a look-ahead step w <- w - relu(a) * gradient, with a
    rate a for every weight. The meta-loss is the loss on the incoming and `replayed` remembered
    rows, averaged over the weights after each look-ahead step. Its gradient updates the rates
    with `rates_lr`, then the weights with the new rates (Gupta et al. 2020, Algorithm 1, eq.
    5-7). C-MAML and Sync La-MAML have `step=fixed`, without and with learned rates.

    As in the code, inner gradients are constants unless `second_order`, and the gradients of the
    weights and of the rates are clipped separately to the norm `clip_norm`. "The memory of old
    tasks" is the memory itself, which is one list in the code. Rows enter it after their last
    glance (in the code during the first), so replayed rows are never among the incoming rows.

    Args:
        rates: Rates that are `learned`, or `fixed` at their initial value.
        rates_start: Initial value of every rate.
        rates_lr: Learning rate of the rates.
        step: Rates of the meta-update of the weights: the learned `rates`, or one `fixed` rate.
        step_lr: Rate of the meta-update with `step=fixed`.
        glances: Meta-updates for each step of the stream.
        memory: Rows of the memory.
        replayed: Remembered rows in a meta-loss.
        clip_norm: Largest norm of a gradient.
        second_order: Whether inner gradients are differentiated.

    Raises:
        ValueError: A number or a word is out of range, or the backbone has batch norm.
    """

    def __init__(
        self,
        setup: LearnerSetup,
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
    ) -> None:
        super().__init__(setup)
        positive("algo", rates_start=rates_start, rates_lr=rates_lr)
        positive("algo", step_lr=step_lr, clip_norm=clip_norm)
        at_least("algo", 1, glances=glances)
        self.rates = rates
        self.rates_start = rates_start
        self.rates_lr = rates_lr
        self.moves = step
        self.step_lr = step_lr
        self.glances = glances
        self.clip_norm = clip_norm
        self.second_order = second_order
        self.reservoir = Replay(glances, memory, replayed)
        self.net = self.build_checked()

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
            # Taken before `leave` adds the incoming rows to the memory.
            bx, by = self.reservoir.rows(state, x, y, step, glance)
            state = self._glance(net, state, x[order], y[order], bx, by)
        return self.reservoir.leave(state, x, y, step)

    def _glance(
        self, net: nn.Module, state: State, x: Tensor, y: Tensor, bx: Tensor, by: Tensor
    ) -> State:
        """Return the state after one meta-update.

        Args:
            net: Network.
            state: State of one rollout before the update.
            x, y: (B, …) incoming rows and targets, for the look-ahead steps.
            bx, by: Rows and targets of the meta-loss.
        """
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
        """Return the weights after a step on one row, differentiable in weights and rates."""
        grads = gradient(
            lambda weights: self.loss(forward(net, weights, x, ForwardContext()), y),
            fast,
            first_order=not self.second_order,
        )
        return {name: value - rates[name].relu() * grads[name] for name, value in fast.items()}

    def _clipped(self, grads: Params) -> Params:
        """Return the gradients, scaled so that their joint norm is at most `clip_norm`."""
        norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
        scale = self.clip_norm / norm.clamp(min=self.clip_norm)
        return {name: grad * scale for name, grad in grads.items()}
