"""A memory of tasks: what was learned of each is kept, and taken up again when it returns.

It follows no single paper: the weights of a task are found again by the likelihood of incoming
rows, as Nagabandi, Finn & Levine (2019) find one of a mixture of models, and the start moves
towards what tasks have in common, as Reptile's does (Nichol et al. 2018).

Shapes: B rows of a step, V rows of a visit, M tasks of the memory, P weights, E numbers of an
embedding, D outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metarun.algorithms.base import forward, positive
from metarun.algorithms.common.online import OnlineLearner, candidates
from metarun.algorithms.common.update_strategies import State, Step, expanded
from metarun.algorithms.functional import Params, flatten, unflatten
from metarun.backbones.layers.context import ForwardContext

_SMALL = 0.05
_LOSSES = 5
"""Losses that what is usual is known from: few, since they fall along a visit."""


class TaskMemory(OnlineLearner):
    """Adapts to the task at hand from a start, or from what it knew of the task if it was met.

    A visit begins where the stream tells so or, where it does not, where after five steps or
    more the loss of incoming rows is above the mean of the last five by `surprise` deviations,
    and above a twentieth of what the start loses on them: a small loss surprises nobody. What
    was learned is then kept: the weights, and as the task's embedding the answers that they
    give to the first `probes` rows of the stream; a task whose embedding is near one in the
    memory takes its place there. The start moves by `start_lr` towards the weights, and the new
    visit begins from it. After every step the rows of the visit so far judge all weights in the
    memory; where the best have less than `accept` times the loss of those at hand, they are
    taken up, and where all rows of the visit say so too, replaced in the end. Which task is
    visited is never told. Without a memory (`memory=0`) this is task-
    free adaptation.

    Args:
        online_lr: Learning rate; of a list, the best on meta-val is taken.
        updates: Gradient steps for each step of the stream, on the rows of the visit.
        visit_rows: Rows of a visit that are learned from, the last ones, V.
        memory: Tasks remembered, M; beyond, the one kept longest ago is given up.
        probes: Rows that embeddings are taken at; zeros where a first visit has fewer.
        same: Mean square difference of embeddings, over the mean square of the new one, below
            which two tasks are the same.
        accept: See above.
        start_lr: Share of the way that the start moves; 0 leaves it.
        surprise: See above.
        **common: Those of `Algorithm`.

    Raises:
        ValueError: A number is out of range, or the backbone has batch norm.
    """

    maps_inside = True
    rate: Tensor

    def __init__(
        self,
        *,
        online_lr: float | Sequence[float] = 0.01,
        updates: int = 10,
        visit_rows: int = 50,
        memory: int = 50,
        probes: int = 20,
        same: float = 0.02,
        accept: float = 0.3,
        start_lr: float = 0.1,
        surprise: float = 5.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        rates = candidates("online_lr", online_lr)
        for name, count in (("updates", updates), ("visit_rows", visit_rows), ("probes", probes)):
            positive(name, count)
        if memory < 0:
            raise ValueError(f"algo.memory={memory}: expected 0 or more")
        for name, value in (("same", same), ("accept", accept), ("surprise", surprise)):
            if not 0.0 <= value < math.inf:
                raise ValueError(f"algo.{name}={value}: expected 0 or more")
        if not 0.0 <= start_lr <= 1.0:
            raise ValueError(f"algo.start_lr={start_lr}: expected 0 to 1")
        self.rates = rates
        self.updates = updates
        self.visit_rows = visit_rows
        self.memory = memory
        self.probes = probes
        self.same = same
        self.accept = accept
        self.start_lr = start_lr
        self.surprise = surprise
        self.register_buffer("rate", torch.tensor(rates[0], dtype=torch.float64))
        self.net = self.made()

    @property
    def options(self) -> Sequence[Mapping[str, float]]:
        return [{"online_lr": rate} for rate in self.rates] if len(self.rates) > 1 else []

    def choose(self, option: Mapping[str, float]) -> None:
        self.rate.fill_(option.get("online_lr", self.rates[0]))

    def begin(self, theta: Params, x: Tensor, y: Tensor) -> State:
        start = flatten(theta)
        none = torch.zeros((), dtype=torch.int64, device=x.device)
        return {
            "weights": start,
            "start": start,
            "rate": self.rate,
            "memory.weights": start.new_zeros(self.memory, len(start)),
            "memory.embedding": start.new_zeros(self.memory, self.probes * self.spec.output_dim),
            "memory.rows": none.expand(self.memory),
            "memory.kept": none,
            "probes": x.new_zeros(self.probes, *x.shape[1:]),
            "visit.x": x.new_zeros(self.visit_rows, *x.shape[1:]),
            "visit.y": y.new_zeros(self.visit_rows, *y.shape[1:]),
            "visit.rows": none,
            # The place in the memory of the task at hand, -1 where it is not known.
            "visit.place": none - 1,
            "surprise.losses": start.new_zeros(_LOSSES),
            "surprise.steps": none,
        }

    def learn(
        self, net: nn.Module, theta: Params, state: State, x: Tensor, y: Tensor, step: Step
    ) -> State:
        state = self._probe(state, x, step)
        surprise = self._loss(net, theta, state["weights"], x, y)
        begins_visit = self._begins(
            state, surprise, self._loss(net, theta, state["start"], x, y), step
        )
        fresh = self._turn(net, theta, state)
        state = {
            name: torch.where(begins_visit, fresh[name], value) for name, value in state.items()
        }
        state = self._meet(state, x, y, surprise, begins_visit)
        if self.memory:
            state = self._recognize(net, theta, state)
        weights = state["weights"]
        for _ in range(self.updates):
            grad = torch.func.grad(lambda w, s=state: self._visit_loss(net, theta, w, s))(weights)
            weights = weights - state["rate"] * grad
        return {**state, "weights": weights}

    def respond(
        self,
        net: nn.Module,
        theta: Params,
        state: State,
        x: Tensor,
        task: Tensor | None,  # noqa: ARG002
    ) -> Tensor:
        return forward(net, unflatten(state["weights"], theta), x, ForwardContext())

    def _probe(self, state: State, x: Tensor, step: Step) -> State:
        """Keep the first rows of the stream."""
        room = self.probes - step.rows
        if room <= 0:
            return state
        rows = x[:room]
        before, after = state["probes"][: step.rows], state["probes"][step.rows + len(rows) :]
        return {**state, "probes": torch.cat([before, rows, after])}

    def _begins(self, state: State, surprise: Tensor, unlearned: Tensor, step: Step) -> Tensor:
        """Whether a visit begins: 0-dimensional, true or false.

        Args:
            state: Of the lifetime.
            surprise: Loss of the incoming rows with the weights at hand.
            unlearned: Their loss with the start.
            step: Where it stands.
        """
        assert self.spec.streams is not None
        if self.spec.streams["test"].task_ids_known or not step.rows:
            return torch.tensor(step.begins_visit and step.rows > 0, device=surprise.device)
        losses = state["surprise.losses"]
        unlike = surprise > losses.mean() + self.surprise * losses.std()
        known = state["surprise.steps"] >= _LOSSES
        return known & unlike & (surprise > _SMALL * unlearned)

    def _turn(self, net: nn.Module, theta: Params, state: State) -> State:
        """The state where a visit has ended and another begins, before its first row."""
        state = self._keep(net, theta, state) if self.memory else state
        start = torch.lerp(state["start"], state["weights"], self.start_lr)
        zero = torch.zeros_like(state["visit.rows"])
        return {
            **state,
            "start": start,
            "weights": start,
            "visit.rows": zero,
            "visit.place": zero - 1,
            "surprise.steps": torch.zeros_like(state["surprise.steps"]),
        }

    def _keep(self, net: nn.Module, theta: Params, state: State) -> State:
        """The memory with what was learned in the visit that ends."""
        embedding = self._embedding(net, theta, state)
        known = state["memory.rows"] > 0
        away = (state["memory.embedding"] - embedding).square().mean(1)
        away = torch.where(known, away, torch.full_like(away, math.inf))
        near = away.min() < self.same * embedding.square().mean()
        free = state["memory.kept"] % self.memory
        place = torch.where(near, away.argmin(), free)
        # The first rows of a visit may have spoken for a task that it was not of.
        taken = state["visit.place"]
        before = state["memory.weights"].index_select(0, taken.clamp(min=0).reshape(1))[0]
        loss = self._visit_loss(net, theta, before, state)
        right = loss < self.accept * self._visit_loss(net, theta, state["start"], state)
        place = torch.where((taken >= 0) & right, taken, place)
        here = torch.arange(self.memory, device=place.device) == place
        new = {
            "memory.weights": state["weights"],
            "memory.embedding": embedding,
            "memory.rows": state["visit.rows"],
        }
        kept = {
            name: torch.where(expanded(here, state[name]), value, state[name])
            for name, value in new.items()
        }
        return {**state, **kept, "memory.kept": state["memory.kept"] + (place == free).long()}

    def _meet(
        self, state: State, x: Tensor, y: Tensor, surprise: Tensor, begins_visit: Tensor
    ) -> State:
        """The state with the incoming rows among those of the visit, and their loss noted."""
        keep = self.visit_rows
        return {
            **state,
            "visit.x": torch.cat([state["visit.x"], x])[-keep:],
            "visit.y": torch.cat([state["visit.y"], y])[-keep:],
            "visit.rows": state["visit.rows"] + len(x),
            "surprise.losses": torch.cat([state["surprise.losses"], surprise[None]])[-_LOSSES:],
            # The loss that a visit begins with is of weights that knew nothing of it.
            "surprise.steps": state["surprise.steps"] + (~begins_visit).long(),
        }

    def _recognize(self, net: nn.Module, theta: Params, state: State) -> State:
        """Take up the weights of the memory that the rows of the visit speak for, if any."""

        def of_memory(weights: Tensor) -> Tensor:
            return self._visit_loss(net, theta, weights, state)

        losses = torch.func.vmap(of_memory)(state["memory.weights"])
        known = state["memory.rows"] > 0
        losses = torch.where(known, losses, torch.full_like(losses, math.inf))
        best = losses.argmin()
        jumps = losses.min() < self.accept * of_memory(state["weights"])
        weights = torch.where(jumps, state["memory.weights"][best], state["weights"])
        place = torch.where(jumps, best, state["visit.place"])
        return {**state, "weights": weights, "visit.place": place}

    def _embedding(self, net: nn.Module, theta: Params, state: State) -> Tensor:
        """(E,) the answers of the weights at hand to the probes."""
        outputs = forward(
            net, unflatten(state["weights"], theta), state["probes"], ForwardContext()
        )
        if self.spec.kind == "classification":
            outputs = outputs.softmax(-1)
        return outputs.flatten()

    def _visit_loss(self, net: nn.Module, theta: Params, weights: Tensor, state: State) -> Tensor:
        """The mean loss of weights (P,) over the rows of the visit so far."""
        outputs = forward(net, unflatten(weights, theta), state["visit.x"], ForwardContext())
        losses = self.row_losses(outputs, state["visit.y"])
        count = state["visit.rows"].clamp(max=self.visit_rows)
        place = torch.arange(self.visit_rows, device=count.device)
        weigh = (place >= self.visit_rows - count).to(losses.dtype)
        return (losses * weigh).sum() / count

    def _loss(self, net: nn.Module, theta: Params, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(forward(net, unflatten(weights, theta), x, ForwardContext()), y)
