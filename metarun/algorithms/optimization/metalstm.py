"""The LSTM meta-learner (Ravi & Larochelle 2017; code twitter-research/meta-learning-lstm).

Shapes: T tasks, S support rows, Q query rows, D outputs, P weights of the learner (coordinates),
H hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup, forward, own_parameters, task_metric
from metarun.algorithms.common.adapting import AdaptingLearner, Support
from metarun.algorithms.functional import Params, flatten, strip_prefix, unflatten
from metarun.algorithms.outer_program import OuterTask
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.normalization import batch_norms
from metarun.core.checks import at_least, pair, within
from metarun.core.types import Progress, TaskBatch

PreviousGate = Literal["logit", "gate"]

# p of the preprocessing (Andrychowicz et al. 2016, appendix A).
_P = 10.0


class State(NamedTuple):
    """State between two inner steps; each coordinate has its own LSTM state.

    `forget` and `rate` are the gates' previous values, as the gates read them.
    """

    hidden: Tensor  # (P, H), of the first layer
    cell: Tensor  # (P, H), of the first layer
    forget: Tensor  # (P,)
    rate: Tensor  # (P,)
    theta: Tensor  # (P,), the learner's weights, which are the cell of the second layer
    statistics: Params  # averages of the batch statistics, by buffer name


class MetaLSTM(AdaptingLearner):
    """The LSTM meta-learner: gates, computed by an LSTM, update the weights of a learner.

    The update is theta_t = f_t * theta_{t-1} - i_t * gradient_t (eq. 2). The input gate i_t takes
    the place of a learning rate. Both gates read the gradient and the loss through a first LSTM
    layer, and theta_{t-1} and their own previous value directly (section 3.2). All coordinates
    share the weights of the two layers, and each has its own state. theta_0 is learned. Gradients
    and losses are treated as constants (section 3.3), so the meta-gradient flows from step to step
    only through theta and the gates.

    Where the official code differs from the paper, the defaults are those of the code. A gate
    reads the logit of its previous value, and the gradient of the mean loss is divided by the
    number of support rows again. Batch norm uses the statistics of the batch in training and in
    the inner steps. With `bn=running`, as in the code, predictions use averages of the inner
    steps' statistics, which are reset for each task (section 3.4).

    Args:
        inner_steps: Inner steps in training; the paper has 12 for one shot and 8 for five.
        hidden_size: Units of the first layer, H.
        forget_bias: Range [low, high] of the forget gate's initial bias; a high bias keeps theta.
        rate_bias: Range [low, high] of the input gate's initial bias; a low bias gives small
            steps.
        previous_gate: Form in which a gate reads its previous value, `logit` or `gate`.
        divide_by_rows: Whether to divide the gradient of the mean loss by the number of support
            rows again.
        bn_momentum: Weight of a step's statistics in the averages of its task.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        inner_steps: int = 12,
        hidden_size: int = 20,
        forget_bias: Sequence[float] = (4.0, 5.0),
        rate_bias: Sequence[float] = (-5.0, -4.0),
        previous_gate: PreviousGate = "logit",
        divide_by_rows: bool = True,
        bn_momentum: float = 0.95,
    ) -> None:
        super().__init__(setup)
        at_least("algo", 0, inner_steps=inner_steps)
        at_least("algo", 1, hidden_size=hidden_size)
        pair("algo.forget_bias", forget_bias)
        pair("algo.rate_bias", rate_bias)
        within("algo", "(0, 1]", bn_momentum=bn_momentum)
        self.inner_steps = inner_steps
        self.hidden_size = hidden_size
        self.previous_gate = previous_gate
        self.divide_by_rows = divide_by_rows
        self.bn_momentum = bn_momentum
        self.net = self.build_network(self.spec.output_dim)
        self.rule = nn.ParameterDict(_first_rule(hidden_size, forget_bias, rate_bias))
        self.optimizer = self.build_optimizer()

    def outer_task(self, batch: TaskBatch, progress: Progress) -> OuterTask:
        def task(net: nn.Module, params: Params, *rows: Tensor) -> tuple[Tensor, Any]:
            support_x, support_y, query_x, query_y, noise = rows
            theta = strip_prefix("net.", params)
            rule = strip_prefix("rule.", params)
            state = self._begin(net, theta)
            for _ in range(self.inner_steps):
                state = self._step(net, rule, state, support_x, support_y, noise)
            outputs = forward(
                net, unflatten(state.theta, theta), query_x, ForwardContext(noise=noise)
            )
            loss = self.loss(outputs, query_y)
            return loss, (loss, task_metric(self.spec, outputs, query_y), {})

        return task, self.training_rows(batch, progress)

    def path(self, net: nn.Module, theta: Params, support: Support, steps: int) -> list[Params]:
        """Return the learner's weights, and with `bn=running` the averages of its statistics.

        The averages are those of the inner steps so far.
        """
        rule = own_parameters(self.rule)
        state = self._begin(net, theta)
        states = [state]
        for _ in range(steps):
            state = self._step(net, rule, state, support.x, support.y)
            states.append(state)
        running = self.bn == "running"
        return [
            {**unflatten(at.theta, theta), **(at.statistics if running else {})} for at in states
        ]

    def _begin(self, net: nn.Module, theta: Params) -> State:
        """Return the state before the first step, with torch's initial running statistics."""
        weights = flatten(theta)
        zeros = torch.zeros_like(weights)
        wide = zeros[:, None].expand(-1, self.hidden_size)
        statistics = {}
        for name, norm in batch_norms(net):
            statistics[f"{name}.running_mean"] = torch.zeros_like(norm.running_mean)
            statistics[f"{name}.running_var"] = torch.ones_like(norm.running_var)
        return State(wide, wide, zeros, zeros, weights, statistics)

    def _step(
        self,
        net: nn.Module,
        rule: Params,
        state: State,
        x: Tensor,
        y: Tensor,
        noise: Tensor | None = None,
    ) -> State:
        """Return the state after one update of the learner on the support rows."""
        shapes = own_parameters(net)

        def loss(theta: Tensor) -> tuple[Tensor, Any]:
            moments: dict[str, tuple[Tensor, Tensor]] = {}
            ctx = ForwardContext(moments=moments, noise=noise)
            return self.loss(forward(net, unflatten(theta, shapes), x, ctx), y), moments

        constant = state.theta.detach()
        slope, (value, moments) = torch.func.grad_and_value(loss, has_aux=True)(constant)
        gradient = slope.detach() / (x.shape[0] if self.divide_by_rows else 1)
        hidden, cell = lstm(rule, preprocess(gradient), preprocess(value.detach()), state)
        forget = _logit(rule, "forget", hidden, state.theta, state.forget)
        rate = _logit(rule, "rate", hidden, state.theta, state.rate)
        theta = torch.sigmoid(forget) * state.theta - torch.sigmoid(rate) * gradient
        if self.previous_gate == "gate":
            forget, rate = torch.sigmoid(forget), torch.sigmoid(rate)
        statistics = dict(state.statistics)
        for name, norm in batch_norms(net):
            for key, fresh in zip(("running_mean", "running_var"), moments[norm.name], strict=True):
                old = statistics[f"{name}.{key}"]
                statistics[f"{name}.{key}"] = torch.lerp(old, fresh, self.bn_momentum)
        return State(hidden, cell, forget, rate, theta, statistics)


def preprocess(x: Tensor) -> Tensor:
    """Encode numbers (…) of any magnitude as pairs of moderate size, (…, 2).

    A pair is (log|x| / p, sign x) where |x| >= e^-p, and (-1, e^p x) elsewhere, with p = 10
    (Andrychowicz et al. 2016, appendix A).
    """
    magnitude = x.abs().clamp(min=math.exp(-_P)).log() / _P
    return torch.stack([magnitude, (math.exp(_P) * x).clamp(-1.0, 1.0)], -1)


def lstm(rule: Params, gradient: Tensor, loss: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Apply the first layer, an LSTM cell whose batch dimension is the coordinates.

    Args:
        rule: Weights of the meta-learner by name.
        gradient: Preprocessed gradient, (P, 2).
        loss: Preprocessed loss, (2,), the same for all coordinates.
        state: State before the step.

    Returns:
        Hidden and cell states, each (P, H).
    """
    shared = loss @ rule["loss"] + rule["bias"]
    sums = gradient @ rule["gradient"] + state.hidden @ rule["hidden"] + shared
    write, keep, read, candidate = sums.chunk(4, -1)
    cell = torch.sigmoid(keep) * state.cell + torch.sigmoid(write) * torch.tanh(candidate)
    return torch.sigmoid(read) * torch.tanh(cell), cell


def _logit(rule: Params, gate: str, hidden: Tensor, theta: Tensor, last: Tensor) -> Tensor:
    """Return the logits (P,) of a gate, which reads [hidden, theta, its previous value]."""
    weight = rule[f"{gate}_weight"]
    return hidden @ weight[:-2] + theta * weight[-2] + last * weight[-1] + rule[f"{gate}_bias"]


def _first_rule(
    hidden_size: int, forget_bias: Sequence[float], rate_bias: Sequence[float]
) -> dict[str, nn.Parameter]:
    """Return the meta-learner's initial weights, drawn from U(-0.01, 0.01) as in the code.

    The biases of the two gates are drawn from the given ranges instead.
    """
    shapes: dict[str, tuple[int, ...]] = {
        "loss": (2, 4 * hidden_size),
        "gradient": (2, 4 * hidden_size),
        "hidden": (hidden_size, 4 * hidden_size),
        "bias": (4 * hidden_size,),
        "forget_weight": (hidden_size + 2,),
        "forget_bias": (),
        "rate_weight": (hidden_size + 2,),
        "rate_bias": (),
    }
    spans = {"forget_bias": forget_bias, "rate_bias": rate_bias}
    return {
        name: nn.Parameter(torch.empty(shape).uniform_(*spans.get(name, (-0.01, 0.01))))
        for name, shape in shapes.items()
    }
