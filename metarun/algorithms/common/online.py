"""Base classes of online learners, which predict each step of a stream before learning from it.

A rollout is one run of a learner along one stream, from `start` to the last step. Its state is a
dictionary of tensors: T rollouts run together, and a killed rollout resumes where it stopped.
`learn` and `respond` are pure functions of one rollout, which the engine maps over T rollouts.

Shapes: T rollouts, S rows of a stream, B rows of a step, R rows, J tasks, M rows of a memory, D
outputs. Encoded rows are rows after `encode`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm, LearnerSetup, forward, own_parameters
from metarun.algorithms.capabilities import Capabilities
from metarun.algorithms.common.update_strategies import (
    RowLoss,
    State,
    Step,
    UpdateStrategy,
    adam_moved,
    with_adam,
)
from metarun.algorithms.functional import Params, add_prefix, descend, gradient, strip_prefix
from metarun.backbones.layers.context import ForwardContext
from metarun.backbones.layers.normalization import has_batch_norm
from metarun.backbones.mlp import MLP
from metarun.core import seeding
from metarun.core.types import Adapted, Prediction, Stream

_SLOT_HEAD = 33


class OnlineLearner(Algorithm):
    """An algorithm that is evaluated on a stream while it learns from it.

    Parameters and buffers hold what is meta-learned, if anything. What is learned during a
    rollout is only in the rollout's `State`.

    A subclass sets `self.net` to the result of `build_checked`, and implements `begin` and
    `learn`. It overrides `respond` if it does not predict with the weights of the state, and
    `outer_task` or `update` if it meta-learns before the rollout.

    Raises:
        ValueError: The backbone has batch norm.
    """

    capabilities = Capabilities(
        learns_online=True, accepts_any_way=True, order_free=False, meta_trains=False
    )

    maps_inside: ClassVar[bool] = False
    """Whether `learn` or `respond` call `torch.func.vmap`."""

    net: Predictor
    head: Sequence[int] = ()
    """Widths of the head's hidden layers."""

    def build(self) -> Predictor:
        """Build a newly initialized network."""
        body = self.build_network(None)
        size: int = body.feature_dim  # type: ignore[assignment]
        return Predictor(body, size, self.head, self.spec.output_dim)

    def build_checked(self) -> Predictor:
        """Build the network of the rollouts and check that it suits the stream.

        Raises:
            ValueError: The backbone has batch norm, or required task ids are unknown.
        """
        assert self.spec.streams is not None
        if self.capabilities.needs_task_ids and not self.spec.streams["test"].task_ids_known:
            raise ValueError(
                f"{type(self).__name__} requires known task ids: use data.task_ids_known=true"
            )
        net = self.build()
        if has_batch_norm(net):
            raise ValueError(
                f"{type(self).__name__} receives a few rows at a time, too few for batch norm: "
                "use backbone.norm=none or instance, or backbone.batch_norm=false"
            )
        return net

    @property
    def online_net(self) -> nn.Module:
        """Online part of `net`, whose weights change along the stream."""
        return self.net

    def encode(self, x: Tensor) -> Tensor:
        """Return the inputs of the online part for rows (T, R, …): the rows, or their features.

        The encoder is constant during a rollout, so each row is encoded only once.
        """
        return x

    @abstractmethod
    def begin(self, theta: Params, x: Tensor, y: Tensor) -> State:
        """Return the state of one rollout before its first step.

        Args:
            theta: Parameters of the online part by name.
            x: Encoded rows of the stream, (S, …); only their number and shape are used.
            y: Targets of these rows, (S, …); likewise.
        """

    @abstractmethod
    def learn(
        self, net: nn.Module, theta: Params, state: State, x: Tensor, y: Tensor, step: Step
    ) -> State:
        """Return the state of one rollout after learning from a step of its stream.

        Args:
            net: Online part of the network, or its replica.
            theta: Meta-learned parameters of the online part by name.
            state: State before the step.
            x: Encoded rows of the step, (B, …).
            y: Targets of these rows, (B, …).
            step: Position in the stream.
        """

    def respond(
        self,
        net: nn.Module,
        theta: Params,  # noqa: ARG002
        state: State,
        x: Tensor,
        task: Tensor | None,  # noqa: ARG002
    ) -> Tensor:
        """Return the predictions (R, D) of one rollout for rows of one task.

        The default uses the weights of the state; a subclass may override it.

        Args:
            net: Online part of the network, or its replica.
            theta: Meta-learned parameters of the online part by name.
            state: State of the rollout.
            x: Encoded rows, (R, …).
            task: Number of the task of the rows, 0-dimensional; None if task ids are unknown.
        """
        return forward(net, strip_prefix("weights.", state), x, ForwardContext())

    # The methods below operate on all T rollouts.

    def start(self, x: Tensor, y: Tensor) -> State:
        """Return the states of T rollouts before the first step, (T, …).

        Args:
            x: Encoded rows of the streams, (T, S, …).
            y: Targets of these rows, (T, S, …).
        """
        state = self.begin(own_parameters(self.online_net), x[0], y[0])
        return {n: v.detach().expand(len(x), *v.shape).clone() for n, v in state.items()}

    def train_in_hindsight(
        self,
        state: State,  # noqa: ARG002
        x: Tensor,  # noqa: ARG002
        y: Tensor,  # noqa: ARG002
        stream: Stream,  # noqa: ARG002
    ) -> Iterator[State]:
        """Yield the states during training on the whole stream in advance, for comparators.

        Only comparators for regret see the stream before the first step; the default yields
        nothing. Training can be stopped after each yielded state.

        Args:
            state: States from `start`.
            x: Encoded rows of the streams, (T, S, …).
            y: Targets of these rows, (T, S, …).
            stream: Layout of the streams.
        """
        return iter(())

    def observe(self, state: State, x: Tensor, y: Tensor, step: Step) -> State:
        """Return the states after learning from a step with encoded rows x (T, B, …)."""

        def one(net: nn.Module, theta: Params, own: State, x: Tensor, y: Tensor) -> State:
            return self.learn(net, theta, own, x, y, step)

        after: State = self._each(one, state, x, y)
        return after

    def answers(self, state: State, x: Tensor, task: int | None) -> Tensor:
        """Return predictions (T, R, D) for encoded rows (T, R, …) of one task."""

        number = None if task is None else torch.tensor(task, device=x.device)

        def one(net: nn.Module, theta: Params, own: State, x: Tensor) -> Tensor:
            return self.respond(net, theta, own, x, number)

        outputs: Tensor = self._each(one, state, x)
        return outputs

    def answers_of_tasks(self, state: State, x: Tensor) -> Tensor:
        """Return predictions (T, J, R, D) for encoded rows (T, J, R, …), index j being task j."""
        tasks = torch.arange(x.shape[1], device=x.device)

        def one(net: nn.Module, theta: Params, own: State, x: Tensor) -> Tensor:
            def of_task(rows: Tensor, task: Tensor) -> Tensor:
                return self.respond(net, theta, own, rows, task)

            together: Tensor = torch.func.vmap(of_task)(x, tasks)
            return together

        outputs: Tensor = self._each(one, state, x)
        return outputs

    def untrained_answers(self, x: Tensor) -> Tensor:
        """Return predictions (T, R, D) of a newly initialized network for raw rows (T, R, …)."""
        with torch.random.fork_rng(devices=[]):
            seeding.seed_torch(seeding.key(self.seed, "untaught"))
            fresh = self.build().to(self.device, self.dtype)
        return torch.stack([fresh(rows, ForwardContext()).detach() for rows in x])

    def rollout_key(self) -> Tensor:
        """Return the key of all random draws of a rollout, 0-dimensional; equal in all rollouts."""
        return torch.tensor(seeding.key(self.seed, "lifetime"), device=self.device)

    def row_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each row, (R,), whose mean is `loss`."""
        if self.spec.kind == "classification":
            return nn.functional.cross_entropy(outputs, targets, reduction="none")
        return (outputs - targets).square().mean(-1)

    def _each(self, function: Any, state: State, *rows: Tensor) -> Any:
        """Map a function `(net, theta, state, *rows)` of one rollout over T states and rows."""
        net = self.online_net

        def one(net: nn.Module, theta: Params, *values: Tensor) -> Any:
            own = dict(zip(state, values[len(rows) :], strict=True))
            return function(net, theta, own, *values[: len(rows)])

        engine = self.engine.resolved(net, self.device)
        if self.maps_inside or self.capabilities.answers_depend_on_task:
            engine = replace(engine, native=False)
        return engine.map(one, net, own_parameters(net), (*rows, *state.values()))

    def adapt(self, support_x: Tensor, support_y: Tensor) -> Adapted:
        """Learn along T streams with unknown task ids, and return the states at their ends.

        A learner that uses task ids treats all rows as rows of one task.
        """
        assert self.spec.streams is not None
        size = self.spec.streams["test"].rows
        x = self.encode(support_x)
        state = self.start(x, support_y)
        for number, first in enumerate(range(0, x.shape[1], size)):
            rows = slice(first, first + size)
            begins = self._only_task is not None and number == 0
            step = Step(number, first, self._only_task, begins_visit=begins)
            state = self.observe(state, x[:, rows], support_y[:, rows], step)
        return state

    def answer(self, adapted: Adapted, query_x: Tensor) -> Prediction:
        return Prediction(self.answers(adapted, self.encode(query_x), self._only_task))

    @property
    def _only_task(self) -> int | None:
        """The task of all rows outside of a rollout; None if predictions do not depend on it."""
        return 0 if self.capabilities.answers_depend_on_task else None


class Predictor(nn.Module):
    """A body that computes features, and a head of any depth that predicts from them.

    Args:
        body: Network from rows to features (R, F), as `Algorithm.build_network(None)` returns it.
        feature_dim: Number of features, F.
        hidden: Widths of the head's hidden layers.
        output_dim: Number of outputs, D.
    """

    def __init__(
        self, body: nn.Module, feature_dim: int, hidden: Sequence[int], output_dim: int
    ) -> None:
        super().__init__()
        self.body = body
        self.head = Head(feature_dim, hidden, output_dim)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        answers: Tensor = self.head(self.body(x, ctx), ctx)
        return answers


class Head(nn.Module):
    """Dense layers with ReLU between them; `last` is the output layer.

    Weights are initialized Kaiming-normal and biases zero, as in the official codes of OML and
    ANML.
    """

    def __init__(self, feature_dim: int, hidden: Sequence[int], output_dim: int) -> None:
        super().__init__()
        self.hidden = (
            MLP((feature_dim,), None, hidden=hidden, init="kaiming_normal") if hidden else None
        )
        self.last = nn.Linear(hidden[-1] if hidden else feature_dim, output_dim)
        nn.init.kaiming_normal_(self.last.weight, nonlinearity="relu")
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        x = x if self.hidden is None else self.hidden(x, ctx)
        answers: Tensor = self.last(x)
        return answers


class WeightLearner(OnlineLearner):
    """An online learner that takes gradient steps on the weights of its online part.

    A subclass sets `self.strategy`, whose default is plain online learning.

    Args:
        online_lr: Learning rate during a rollout. From a list, meta-validation chooses the best.
        online_optim: Optimizer of the rollout, `sgd` or `adam` (betas 0.9 and 0.999); Javed &
            White's code uses `adam` for characters.
        adapt: Weights that learn during a rollout, `all` or those of the `head`.
        head: Widths of the head's hidden layers.
        reset: Whether a rollout starts with a newly initialized last layer: Kaiming-normal weights
            and zero biases, as in Javed & White's code for characters.

    Raises:
        ValueError: A setting is out of range, or the backbone has batch norm.
    """

    rate: Tensor

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        online_lr: float | Sequence[float] = 0.003,
        online_optim: Literal["sgd", "adam"] = "sgd",
        adapt: Literal["all", "head"] = "all",
        head: Sequence[int] = (),
        reset: bool = False,
    ) -> None:
        super().__init__(setup)
        rates = candidates("online_lr", online_lr)
        self.rates = rates
        self.online_optim = online_optim
        self.part = adapt
        self.reset = reset
        self.strategy = UpdateStrategy()
        self.register_buffer("rate", torch.tensor(rates[0], dtype=torch.float64))
        if any(width < 1 for width in head):
            raise ValueError(f"algo.head={list(head)}: expected positive widths")
        self.head = list(head)
        self.net = self.build_checked()

    @property
    def options(self) -> Sequence[Mapping[str, float]]:
        return [{"online_lr": rate} for rate in self.rates] if len(self.rates) > 1 else []

    def choose(self, option: Mapping[str, float]) -> None:
        self.rate.fill_(option.get("online_lr", self.rates[0]))

    @property
    def online_net(self) -> nn.Module:
        return self.net.head if self.part == "head" else self.net

    def encode(self, x: Tensor) -> Tensor:
        if self.part == "all":
            return x
        return torch.stack([self.net.body(rows, ForwardContext()) for rows in x])

    def begin(self, theta: Params, x: Tensor, y: Tensor) -> State:
        weights = self._reset(theta) if self.reset else dict(theta)
        adam = self.online_optim == "adam"
        return {
            **(with_adam(weights) if adam else add_prefix("weights.", weights)),
            "key": self.rollout_key(),
            "rate": self.rate,
            **self.strategy.begin(weights, x, y),
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
        loss = self._loss_of(net)
        state = self.strategy.enter(state, strip_prefix("weights.", state), loss, step)
        for update in range(self.strategy.updates):
            rows = self.strategy.rows(state, x, y, step, update)
            state = self._descend(state, loss, *rows)
        return self.strategy.leave(state, x, y, step)

    def _loss_of(self, net: nn.Module) -> RowLoss:
        """Return the mean loss on encoded rows as a function of the online part's weights."""
        return lambda weights, x, y: self.loss(forward(net, weights, x, ForwardContext()), y)

    def _descend(self, state: State, loss: RowLoss, x: Tensor, y: Tensor) -> State:
        """Return the state after one gradient step."""
        weights = strip_prefix("weights.", state)

        def held(weights: Params) -> Tensor:
            penalty = self.strategy.penalty(state, weights)
            own = loss(weights, x, y)
            return own if penalty is None else own + penalty

        grads = gradient(held, weights, first_order=True)
        if self.online_optim == "adam":
            return {**state, **adam_moved(state, grads, state["rate"])}
        moved = descend(weights, grads, lr=dict.fromkeys(weights, state["rate"]))
        return {**state, **add_prefix("weights.", moved)}

    def _reset(self, theta: Params) -> Params:
        """Return the parameters with a newly initialized last layer."""
        prefix = "last." if self.part == "head" else "head.last."
        weight = theta[f"{prefix}weight"]
        key = torch.tensor(seeding.key(self.seed, "head"), device=weight.device)
        drawn = seeding.normal(key, _SLOT_HEAD, weight.shape, dtype=weight.dtype)
        return {
            **theta,
            f"{prefix}weight": drawn * math.sqrt(2.0 / weight.shape[1]),
            f"{prefix}bias": torch.zeros_like(theta[f"{prefix}bias"]),
        }


def candidates(name: str, rates: float | Sequence[float]) -> list[float]:
    """Return the learning rates from which meta-validation chooses, as a list.

    Args:
        name: Key of the setting, without `algo.`.
        rates: Value of the setting, a number or a list.

    Raises:
        ValueError: The list is empty, or a rate is not positive and finite.
    """
    found = [rates] if isinstance(rates, int | float) else list(rates)
    if not found or not all(0.0 < rate < math.inf for rate in found):
        raise ValueError(f"algo.{name}={rates}: expected positive numbers")
    return found
