"""A memory of tasks: the weights of each task are stored, and restored when the task returns.

It follows no single paper. Stored weights are recognized by the likelihood of incoming rows, as
Nagabandi, Finn & Levine (2019) select a model of a mixture. The initialization moves toward the
weights of tasks, as in Reptile (Nichol et al. 2018).

Shapes: B rows of a step, V rows of a visit, M tasks of the memory, P weights, E dimensions of an
embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup, forward
from metarun.algorithms.common.online import OnlineLearner, candidates
from metarun.algorithms.common.update_strategies import State, Step, expanded
from metarun.algorithms.functional import Params, flatten, unflatten
from metarun.backbones.layers.context import ForwardContext
from metarun.core.checks import at_least, within

_SMALL = 0.05
_LOSSES = 5
"""Recent losses that define the usual loss: few, since losses fall along a visit."""


class TaskMemory(OnlineLearner):
    """Adapts to the current task from an initialization, or from stored weights of the task.

    A visit begins at a known task boundary. If boundaries are not known, it begins where the loss
    of incoming rows exceeds the mean of the last five losses by `surprise` standard deviations,
    at the earliest after five steps. This loss also has to exceed a twentieth of the loss of the
    initialization on the same rows: small losses are ignored.

    At the end of a visit the weights are stored with an embedding of the task: the predictions of
    the first `probes` rows of the stream. If a stored embedding is similar, its entry is replaced.
    The initialization then moves by `start_lr` toward the weights, and the new visit starts from
    it.

    After every step all stored weights are evaluated on the rows of the visit so far. If the loss
    of the best ones is less than `accept` times the current loss, they replace the current
    weights. Their entry is overwritten at the end of the visit if its rows confirm the match. The
    identity of the task is never used. With `memory=0` this is task-free adaptation.

    Args:
        online_lr: Learning rate, or a list of which the best on meta-val is used.
        updates: Gradient steps for each step of the stream, on the rows of the visit.
        visit_rows: Number V of the latest rows of a visit that are learned from.
        memory: Tasks M of the memory. With more tasks, the entry stored longest ago is replaced.
        probes: Rows whose predictions form the embedding; zeros if the first visit has fewer.
        same: Largest mean squared difference of the embeddings of one task, relative to the mean
            square of the new one.
        accept: Largest ratio of losses at which stored weights are restored, as above.
        start_lr: Fraction by which the initialization moves toward the weights; 0 keeps it.
        surprise: Number of standard deviations at which a visit begins, as above.

    Raises:
        ValueError: A number is out of range, or the backbone has batch norm.
    """

    maps_inside = True
    rate: Tensor

    def __init__(
        self,
        setup: LearnerSetup,
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
    ) -> None:
        super().__init__(setup)
        rates = candidates("online_lr", online_lr)
        at_least("algo", 1, updates=updates, visit_rows=visit_rows, probes=probes)
        at_least("algo", 0, memory=memory, same=same, accept=accept, surprise=surprise)
        within("algo", "[0, 1]", start_lr=start_lr)
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
        self.net = self.build_checked()

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
            # The memory entry whose weights were restored in this visit, -1 if none.
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
        """Return the state with incoming rows among the probes, until there are enough."""
        room = self.probes - step.rows
        if room <= 0:
            return state
        rows = x[:room]
        before, after = state["probes"][: step.rows], state["probes"][step.rows + len(rows) :]
        return {**state, "probes": torch.cat([before, rows, after])}

    def _begins(self, state: State, surprise: Tensor, unlearned: Tensor, step: Step) -> Tensor:
        """Return whether a visit begins, as a 0-dimensional boolean tensor.

        Args:
            state: State of the rollout.
            surprise: Loss of the incoming rows with the current weights.
            unlearned: Loss of the incoming rows with the initialization.
            step: Current step of the stream.
        """
        assert self.spec.streams is not None
        if self.spec.streams["test"].task_ids_known or not step.rows:
            return torch.tensor(step.begins_visit and step.rows > 0, device=surprise.device)
        losses = state["surprise.losses"]
        unlike = surprise > losses.mean() + self.surprise * losses.std()
        known = state["surprise.steps"] >= _LOSSES
        return known & unlike & (surprise > _SMALL * unlearned)

    def _turn(self, net: nn.Module, theta: Params, state: State) -> State:
        """Return the state after the end of a visit, before the first row of the next one."""
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
        """Return the state with the weights of the ending visit in the memory."""
        embedding = self._embedding(net, theta, state)
        known = state["memory.rows"] > 0
        away = (state["memory.embedding"] - embedding).square().mean(1)
        away = torch.where(known, away, torch.full_like(away, math.inf))
        near = away.min() < self.same * embedding.square().mean()
        free = state["memory.kept"] % self.memory
        place = torch.where(near, away.argmin(), free)
        # The first rows of a visit may have matched another task: check on all of its rows.
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
        """Return the state with the incoming rows and their loss in the records of the visit."""
        keep = self.visit_rows
        return {
            **state,
            "visit.x": torch.cat([state["visit.x"], x])[-keep:],
            "visit.y": torch.cat([state["visit.y"], y])[-keep:],
            "visit.rows": state["visit.rows"] + len(x),
            "surprise.losses": torch.cat([state["surprise.losses"], surprise[None]])[-_LOSSES:],
            # The first loss of a visit does not count: its weights have not seen the task.
            "surprise.steps": state["surprise.steps"] + (~begins_visit).long(),
        }

    def _recognize(self, net: nn.Module, theta: Params, state: State) -> State:
        """Return the state with stored weights restored if they fit the rows of the visit."""

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
        """Return the embedding (E,): predictions of the probes by the current weights."""
        outputs = forward(
            net, unflatten(state["weights"], theta), state["probes"], ForwardContext()
        )
        if self.spec.kind == "classification":
            outputs = outputs.softmax(-1)
        return outputs.flatten()

    def _visit_loss(self, net: nn.Module, theta: Params, weights: Tensor, state: State) -> Tensor:
        """Return the mean loss of weights (P,) over the rows of the visit so far."""
        outputs = forward(net, unflatten(weights, theta), state["visit.x"], ForwardContext())
        losses = self.row_losses(outputs, state["visit.y"])
        count = state["visit.rows"].clamp(max=self.visit_rows)
        place = torch.arange(self.visit_rows, device=count.device)
        weigh = (place >= self.visit_rows - count).to(losses.dtype)
        return (losses * weigh).sum() / count

    def _loss(self, net: nn.Module, theta: Params, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of weights (P,) on rows (B, …)."""
        return self.loss(forward(net, unflatten(weights, theta), x, ForwardContext()), y)
