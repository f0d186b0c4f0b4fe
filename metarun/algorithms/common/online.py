"""Learners that live along a stream, judged on each step before they learn from it.

A lifetime is one trajectory, lived through from `start` to its end. Its state is a dictionary of
tensors, so that T lifetimes run together and a killed one goes on where it was. `learn` and
`respond` are pure functions of one lifetime; the engine maps them over all.

Shapes: T lifetimes, B rows of a step, R rows, M rows of a memory, D outputs.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm, forward, own_parameters
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
from metarun.core.types import Metrics, Prediction, Progress, Stream, TaskBatch

_SLOT_HEAD = 33


class OnlineLearner(Algorithm):
    """A learner that is judged on a stream while it learns from it.

    Whatever it meta-learns, if anything, is in its parameters and buffers as everywhere; what it
    learns in a lifetime is in the lifetime's `State` alone.

    A subclass sets `self.net` to what `made` gives and writes `begin` and `learn`, `respond`
    where it does not answer by its weights as they are, and `update` where it learns something
    before it lives.

    Raises:
        ValueError: The backbone has batch norm.
    """

    learns_online: ClassVar[bool] = True
    accepts_any_way: bool = True
    order_free: bool = False
    meta_trains: ClassVar[bool] = False
    answers_depend_on_task: ClassVar[bool] = False
    """Whether an answer depends on which task is asked about, where that is told."""

    maps_inside: ClassVar[bool] = False
    """Whether `learn` or `respond` themselves map over something, by torch's vmap."""
    needs_task_ids: ClassVar[bool] = False
    """Whether it can live only where the stream tells which task is which."""

    net: Predictor
    head: Sequence[int] = ()
    """Widths of the head's hidden layers."""

    def update(self, batch: TaskBatch, progress: Progress) -> Metrics:
        raise NotImplementedError(f"{type(self).__name__} learns online alone")

    def build(self) -> Predictor:
        """Draw a network."""
        body = self.build_network(None)
        size: int = body.feature_dim  # type: ignore[assignment]
        return Predictor(body, size, self.head, self.spec.output_dim)

    def made(self) -> Predictor:
        """Draw the network that is to live.

        Raises:
            ValueError: The backbone has batch norm, or the stream does not tell what is needed.
        """
        assert self.spec.streams is not None
        if self.needs_task_ids and not self.spec.streams["test"].task_ids_known:
            raise ValueError(
                f"{type(self).__name__} keeps tasks apart: use data.task_ids_known=true"
            )
        net = self.build()
        if has_batch_norm(net):
            raise ValueError(
                f"{type(self).__name__} meets a few rows at a time, which have no batch to be "
                "normalized by: use backbone.norm=none or instance, or backbone.batch_norm=false"
            )
        return net

    @property
    def online_net(self) -> nn.Module:
        """The network that lives: the part of `net` whose weights change along the stream."""
        return self.net

    def encode(self, x: Tensor) -> Tensor:
        """What the plastic part sees of rows (T, R, …): they themselves, or features of them.

        Whatever is here stays as it is for a lifetime, so that it is computed once.
        """
        return x

    @abstractmethod
    def begin(self, theta: Params, x: Tensor, y: Tensor) -> State:
        """The state of one lifetime before its first step.

        Args:
            theta: Parameters of the plastic part.
            x, y: (S, …) perceived rows of the stream, for their number and shapes alone.
        """

    @abstractmethod
    def learn(
        self, net: nn.Module, theta: Params, state: State, x: Tensor, y: Tensor, step: Step
    ) -> State:
        """The state of one lifetime after a step of its stream.

        Args:
            net: The plastic part, or its replica.
            theta: Its parameters by name.
            state: As it was.
            x, y: (B, …) perceived rows and their targets.
            step: Where it stands.
        """

    def respond(
        self,
        net: nn.Module,
        theta: Params,  # noqa: ARG002
        state: State,
        x: Tensor,
        task: Tensor | None,  # noqa: ARG002
    ) -> Tensor:
        """Answer (R, D) to perceived rows (R, …) of a task, in one lifetime.

        With the weights of the state, unless a subclass knows better.

        Args:
            net, theta, state: As in `learn`.
            x: The rows.
            task: Which task they are of, 0-dimensional; None where it is not told.
        """
        return forward(net, strip_prefix("weights.", state), x, ForwardContext())

    # Over all lifetimes.

    def start(self, x: Tensor, y: Tensor) -> State:
        """The states (T, …) of T lifetimes, from the perceived rows (T, S, …) of their streams."""
        state = self.begin(own_parameters(self.online_net), x[0], y[0])
        return {n: v.detach().expand(len(x), *v.shape).clone() for n, v in state.items()}

    def train_in_hindsight(
        self,
        state: State,  # noqa: ARG002
        x: Tensor,  # noqa: ARG002
        y: Tensor,  # noqa: ARG002
        stream: Stream,  # noqa: ARG002
    ) -> Iterator[State]:
        """What the states become before the first step, bit by bit, so that it can be stopped.

        Nobody knows what is to come but those whom regret is counted against.

        Args:
            state: What `start` gives.
            x, y: (T, S, …) the perceived rows of the streams and their targets.
            stream: The layout.
        """
        return iter(())

    def observe(self, state: State, x: Tensor, y: Tensor, step: Step) -> State:
        """The states after a step with perceived rows (T, B, …)."""

        def one(net: nn.Module, theta: Params, own: State, x: Tensor, y: Tensor) -> State:
            return self.learn(net, theta, own, x, y, step)

        after: State = self._each(one, state, x, y)
        return after

    def answers(self, state: State, x: Tensor, task: int | None) -> Tensor:
        """(T, R, D) answers to perceived rows (T, R, …)."""

        number = None if task is None else torch.tensor(task, device=x.device)

        def one(net: nn.Module, theta: Params, own: State, x: Tensor) -> Tensor:
            return self.respond(net, theta, own, x, number)

        outputs: Tensor = self._each(one, state, x)
        return outputs

    def answers_of_tasks(self, state: State, x: Tensor) -> Tensor:
        """(T, J, R, D) answers to perceived rows (T, J, R, …), those at j of task j."""
        tasks = torch.arange(x.shape[1], device=x.device)

        def one(net: nn.Module, theta: Params, own: State, x: Tensor) -> Tensor:
            def of_task(rows: Tensor, task: Tensor) -> Tensor:
                return self.respond(net, theta, own, rows, task)

            together: Tensor = torch.func.vmap(of_task)(x, tasks)
            return together

        outputs: Tensor = self._each(one, state, x)
        return outputs

    def untrained_answers(self, x: Tensor) -> Tensor:
        """(T, R, D) answers of a network drawn anew to rows (T, R, …) as the data have them."""
        with torch.random.fork_rng(devices=[]):
            seeding.seed_torch(seeding.key(self.seed, "untaught"))
            fresh = self.build().to(self.device, self.dtype)
        return torch.stack([fresh(rows, ForwardContext()).detach() for rows in x])

    def rollout_key(self) -> Tensor:
        """The key of all draws of a lifetime, 0-dimensional; every lifetime has the same."""
        return torch.tensor(seeding.key(self.seed, "lifetime"), device=self.device)

    def row_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(R,) the loss of each row, whose mean is `loss`."""
        if self.spec.kind == "classification":
            return nn.functional.cross_entropy(outputs, targets, reduction="none")
        return (outputs - targets).square().mean(-1)

    def _each(self, lifetime: Any, state: State, *rows: Tensor) -> Any:
        """Map `lifetime(net, theta, state, *rows)` over T states and rows (T, …)."""
        net = self.online_net

        def one(net: nn.Module, theta: Params, *values: Tensor) -> Any:
            own = dict(zip(state, values[len(rows) :], strict=True))
            return lifetime(net, theta, own, *values[: len(rows)])

        engine = self.engine.resolved(net, self.device)
        if self.maps_inside or self.answers_depend_on_task:
            engine = replace(engine, native=False)
        return engine.map(one, net, own_parameters(net), (*rows, *state.values()))

    def predict(self, support_x: Tensor, support_y: Tensor, query_x: Tensor) -> Prediction:
        """Live through T streams that say nothing of their tasks, then answer.

        A learner that asks for tasks takes all rows for those of one.
        """
        assert self.spec.streams is not None
        size = self.spec.streams["test"].rows
        task = 0 if self.answers_depend_on_task else None
        x = self.encode(support_x)
        state = self.start(x, support_y)
        for number, first in enumerate(range(0, x.shape[1], size)):
            rows = slice(first, first + size)
            step = Step(number, first, task, begins_visit=task is not None and number == 0)
            state = self.observe(state, x[:, rows], support_y[:, rows], step)
        return Prediction(self.answers(state, self.encode(query_x), task))


class Predictor(nn.Module):
    """A body that represents and a head of any depth that predicts.

    Args:
        body: Maps rows to features (R, F), as `Algorithm.build_network(None)` makes it.
        feature_dim: F.
        hidden: Widths of the head's hidden layers.
        output_dim: D.
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
    """Dense layers with ReLU between them; `last` is the one that answers.

    They start Kaiming normal with no biases, as in the official codes of OML and ANML.
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
    """Lives by gradient steps on the weights of its plastic part, by a rule.

    A subclass sets `self.strategy` where it is not plain online learning.

    Args:
        online_lr: Learning rate of a lifetime; of a list, the best on meta-val is taken.
        online_optim: `sgd`, or `adam` (betas 0.9 and 0.999), as Javed & White's code has it for
            characters.
        adapt: What learns in a lifetime: `all` weights, or the `head`.
        head: Widths of the head's hidden layers.
        reset: Whether a lifetime begins with a last layer drawn anew: Kaiming normal weights and
            no biases, as in Javed & White's code for characters.
        **common: Those of `Algorithm`.

    Raises:
        ValueError: A number or a word is out of range, or the backbone has batch norm.
    """

    rate: Tensor

    def __init__(
        self,
        *,
        online_lr: float | Sequence[float] = 0.003,
        online_optim: Literal["sgd", "adam"] = "sgd",
        adapt: Literal["all", "head"] = "all",
        head: Sequence[int] = (),
        reset: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        rates = candidates("online_lr", online_lr)
        if online_optim not in ("sgd", "adam"):
            raise ValueError(f"algo.online_optim={online_optim}: expected sgd or adam")
        if adapt not in ("all", "head"):
            raise ValueError(f"algo.adapt={adapt}: expected all or head")
        self.rates = rates
        self.online_optim = online_optim
        self.adapt = adapt
        self.reset = reset
        self.strategy = UpdateStrategy()
        self.register_buffer("rate", torch.tensor(rates[0], dtype=torch.float64))
        if any(width < 1 for width in head):
            raise ValueError(f"algo.head={list(head)}: expected positive widths")
        self.head = list(head)
        self.net = self.made()

    @property
    def options(self) -> Sequence[Mapping[str, float]]:
        return [{"online_lr": rate} for rate in self.rates] if len(self.rates) > 1 else []

    def choose(self, option: Mapping[str, float]) -> None:
        self.rate.fill_(option.get("online_lr", self.rates[0]))

    @property
    def online_net(self) -> nn.Module:
        return self.net.head if self.adapt == "head" else self.net

    def encode(self, x: Tensor) -> Tensor:
        if self.adapt == "all":
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
        """The mean loss of weights of the plastic part on perceived rows."""
        return lambda weights, x, y: self.loss(forward(net, weights, x, ForwardContext()), y)

    def _descend(self, state: State, loss: RowLoss, x: Tensor, y: Tensor) -> State:
        """The state after one gradient step."""
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
        """The parameters with the last layer drawn anew."""
        prefix = "last." if self.adapt == "head" else "head.last."
        weight = theta[f"{prefix}weight"]
        key = torch.tensor(seeding.key(self.seed, "head"), device=weight.device)
        drawn = seeding.normal(key, _SLOT_HEAD, weight.shape, dtype=weight.dtype)
        return {
            **theta,
            f"{prefix}weight": drawn * math.sqrt(2.0 / weight.shape[1]),
            f"{prefix}bias": torch.zeros_like(theta[f"{prefix}bias"]),
        }


def candidates(name: str, rates: float | Sequence[float]) -> list[float]:
    """The learning rates that meta-val is to choose among, from an option of an algorithm's.

    Raises:
        ValueError: There are none, or one is not positive.
    """
    found = [rates] if isinstance(rates, int | float) else list(rates)
    if not found or not all(0.0 < rate < math.inf for rate in found):
        raise ValueError(f"algo.{name}={rates}: expected positive numbers")
    return found
