"""FTML: follow the meta-leader (Finn, Rajeswaran, Kakade & Levine 2019). No official code exists.

Shapes: K rows of a task in the buffer, N tasks of a meta-update, R rows of each of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.base import LearnerSetup, forward
from metarun.algorithms.common.online import OnlineLearner, candidates
from metarun.algorithms.common.update_strategies import (
    State,
    Step,
    adam_moved,
    draw_key,
    expanded,
    with_adam,
)
from metarun.algorithms.functional import Params, sgd_adapt, strip_prefix
from metarun.backbones.layers.context import ForwardContext
from metarun.core import seeding
from metarun.core.checks import at_least
from metarun.core.types import Stream

_SLOT_TASK, _SLOT_SUPPORT, _SLOT_QUERY = 35, 36, 37


class FTML(OnlineLearner):
    """Meta-learns an initialization from all tasks met so far, and adapts it to each task.

    Rows enter the buffer of their task as they come. Each step of the stream is followed by
    `meta_updates` updates of the weights w by Adam (Finn et al. 2019, Algorithm 2). An update
    draws `meta_tasks` tasks of the buffer uniformly, and support and query rows of each. Its
    gradient is that of the query loss after `inner_steps` steps on the support rows. To predict
    a task, w is adapted to all its rows so far (Algorithm 3). A task not yet met is predicted by
    w.

    The paper's comparators differ in the objective. `joint` trains w on the rows of the buffer
    without inner steps, and predicts with adaptation (follow the leader) or without it
    (`inner_steps=0`: train on everything). `none` does not train w and only adapts (from
    scratch). With `freeze_after`, w is trained on the first visits only, as a MAML that stops
    meta-learning.

    Args:
        objective: Objective of w: `meta`, `joint` or `none`.
        meta_lr: Adam's learning rate of w, or a list of rates.
        meta_updates: Updates of w for each step of the stream.
        meta_tasks: Tasks N of an update.
        meta_rows: Support rows and query rows of each task, drawn with replacement.
        inner_lr: Learning rate of the adaptation, or a list of rates. Of all pairs with
            `meta_lr`, the best on meta-val is used.
        inner_steps: Gradient steps of the adaptation.
        second_order: Whether inner gradients are differentiated.
        memory: Tasks M of the buffer. With more tasks, task j replaces task j - M; if no task
            returns, this is the one met longest ago.
        freeze_after: Number of visits after which w is constant; None always trains it.

    Raises:
        ValueError: A number or a word is out of range, the backbone has batch norm, or the
            tasks of the stream are not known.
    """

    capabilities = replace(
        OnlineLearner.capabilities, answers_depend_on_task=True, needs_task_ids=True
    )
    meta_rate: Tensor
    inner_rate: Tensor

    def __init__(
        self,
        setup: LearnerSetup,
        *,
        objective: Literal["meta", "joint", "none"] = "meta",
        meta_lr: float | Sequence[float] = 0.001,
        meta_updates: int = 1,
        meta_tasks: int = 10,
        meta_rows: int = 10,
        inner_lr: float | Sequence[float] = 0.01,
        inner_steps: int = 5,
        second_order: bool = True,
        memory: int = 100,
        freeze_after: int | None = None,
    ) -> None:
        super().__init__(setup)
        meta_rates, inner_rates = candidates("meta_lr", meta_lr), candidates("inner_lr", inner_lr)
        at_least("algo", 1, meta_updates=meta_updates, meta_tasks=meta_tasks, meta_rows=meta_rows)
        at_least("algo", 1, memory=memory, freeze_after=freeze_after)
        at_least("algo", 0, inner_steps=inner_steps)
        self.objective = objective
        self.meta_rates = meta_rates
        self.inner_rates = inner_rates
        self.meta_updates = meta_updates
        self.meta_tasks = meta_tasks
        self.meta_rows = meta_rows
        self.inner_steps = inner_steps
        self.second_order = second_order
        self.memory = memory
        self.freeze_after = freeze_after
        self.register_buffer("meta_rate", torch.tensor(meta_rates[0], dtype=torch.float64))
        self.register_buffer("inner_rate", torch.tensor(inner_rates[0], dtype=torch.float64))
        self.net = self.build_checked()

    @property
    def options(self) -> Sequence[Mapping[str, float]]:
        pairs = itertools.product(self.meta_rates, self.inner_rates)
        found = [{"meta_lr": meta, "inner_lr": inner} for meta, inner in pairs]
        return found if len(found) > 1 else []

    def choose(self, option: Mapping[str, float]) -> None:
        self.meta_rate.fill_(option.get("meta_lr", self.meta_rates[0]))
        self.inner_rate.fill_(option.get("inner_lr", self.inner_rates[0]))

    def begin(self, theta: Params, x: Tensor, y: Tensor) -> State:
        assert self.spec.streams is not None
        layouts = self.spec.streams.values()
        slots = min(self.memory, max(stream.num_tasks for stream in layouts))
        most = max(
            stream.visits.count(task) * stream.steps * stream.rows
            for stream in layouts
            for task in range(stream.num_tasks)
        )
        return {
            **with_adam(theta),
            "meta_rate": self.meta_rate,
            "inner_rate": self.inner_rate,
            "key": self.rollout_key(),
            "tasks.x": x.new_zeros(slots, most, *x.shape[1:]),
            "tasks.y": y.new_zeros(slots, most, *y.shape[1:]),
            "tasks.rows": torch.zeros(slots, dtype=torch.int64, device=x.device),
            "tasks.owner": torch.full((slots,), -1, device=x.device),
            "tasks.visits": torch.zeros((), dtype=torch.int64, device=x.device),
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
        assert step.task is not None
        state = self._keep(state, x, y, step)
        if self.objective == "none":
            return state
        for update in range(self.meta_updates):
            state = self._meta_update(net, state, step, update)
        return state

    def respond(
        self,
        net: nn.Module,
        theta: Params,  # noqa: ARG002
        state: State,
        x: Tensor,
        task: Tensor | None,
    ) -> Tensor:
        weights = strip_prefix("weights.", state)
        if task is None or not self.inner_steps:
            return forward(net, weights, x, ForwardContext())
        # Rows of other tasks have weight 0, so for a task not yet met the weights do not change.
        slot = (task % len(state["tasks.owner"])).reshape(1)
        names = ("owner", "rows", "x", "y")
        owner, count, kept_x, kept_y = (
            state[f"tasks.{name}"].index_select(0, slot)[0] for name in names
        )
        weigh = self._first(torch.where(owner == task, count, 0), len(kept_x))
        rate = state["inner_rate"]
        adapted = self._adapt(net, weights, rate, kept_x, kept_y, weigh, first_order=True)
        return forward(net, adapted, x, ForwardContext())

    def _keep(self, state: State, x: Tensor, y: Tensor, step: Step) -> State:
        """Return the state with the incoming rows in the buffer of their task."""
        assert step.task is not None
        slots, most = state["tasks.x"].shape[:2]
        slot = step.task % slots
        here = torch.arange(slots, device=x.device) == slot
        rows, owner = state["tasks.rows"], state["tasks.owner"]
        rows = torch.where(here & (owner != step.task), 0, rows)
        # Once the buffer of a task is full, new rows overwrite its oldest ones.
        places = (rows[slot] + torch.arange(len(x), device=x.device)) % most
        index = torch.arange(most, device=x.device)
        source = (places[:, None] == index).to(torch.int64)
        taken, which = source.amax(0).bool(), source.argmax(0)
        kept: State = {}
        for name, incoming in (("tasks.x", x), ("tasks.y", y)):
            before = state[name][slot]
            after = torch.where(expanded(taken, before), incoming[which], before)
            kept[name] = torch.where(expanded(here, state[name]), after, state[name])
        return {
            **state,
            **kept,
            "tasks.rows": torch.where(here, rows + len(x), rows),
            "tasks.owner": torch.where(here, step.task, owner),
            "tasks.visits": state["tasks.visits"] + int(step.begins_visit),
        }

    def _meta_update(self, net: nn.Module, state: State, step: Step, update: int) -> State:
        """Return the state after one update of the weights by Adam."""
        weights = strip_prefix("weights.", state)
        key = draw_key(state, step, update, state["key"].device)
        most = state["tasks.x"].shape[1]
        met = state["tasks.owner"] >= 0
        # Uniformly among the tasks in the buffer, which fill it from the front.
        drawn = seeding.uniform(key, _SLOT_TASK, (self.meta_tasks,), dtype=torch.float64)
        chosen = (drawn * met.sum()).long()
        rows = state["tasks.rows"].clamp(max=most)[chosen]
        parts = [
            self._drawn_rows(state, key, slot, chosen, rows)
            for slot in (_SLOT_SUPPORT, _SLOT_QUERY)
        ]
        (support_x, support_y), (query_x, query_y) = parts

        def of_task(weights: Params, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
            adapted = weights
            if self.objective == "meta":
                every = torch.ones(len(sx), dtype=sx.dtype, device=sx.device)
                first_order = not self.second_order
                rate = state["inner_rate"]
                adapted = self._adapt(net, weights, rate, sx, sy, every, first_order=first_order)
            return self.loss(forward(net, adapted, qx, ForwardContext()), qy)

        def loss(weights: Params) -> Tensor:
            mapped = torch.func.vmap(of_task, in_dims=(None, 0, 0, 0, 0))
            return mapped(weights, support_x, support_y, query_x, query_y).mean()

        grads = torch.func.grad(loss)(weights)
        new = adam_moved(state, grads, state["meta_rate"])
        if self.freeze_after is not None:
            learns = state["tasks.visits"] <= self.freeze_after
            new = {name: torch.where(learns, value, state[name]) for name, value in new.items()}
        return {**state, **new}

    def _drawn_rows(
        self, state: State, key: Tensor, slot: int, chosen: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return rows and targets (N, R, …) of the chosen tasks, drawn with replacement."""
        shape = (self.meta_tasks, self.meta_rows)
        place = seeding.uniform(key, slot, shape, dtype=torch.float64) * rows[:, None]
        index = place.long()
        return state["tasks.x"][chosen[:, None], index], state["tasks.y"][chosen[:, None], index]

    def _adapt(
        self,
        net: nn.Module,
        weights: Params,
        rate: Tensor,
        x: Tensor,
        y: Tensor,
        weigh: Tensor,
        *,
        first_order: bool,
    ) -> Params:
        """Return the weights after the inner steps on rows (K, …) with row weights (K,)."""
        total = weigh.sum().clamp(min=1.0)

        def loss(weights: Params) -> Tensor:
            outputs = forward(net, weights, x, ForwardContext())
            return (self.row_losses(outputs, y) * weigh).sum() / total

        rates = dict.fromkeys(weights, rate)
        return sgd_adapt(loss, weights, lr=rates, steps=self.inner_steps, first_order=first_order)

    def _first(self, count: Tensor, most: int) -> Tensor:
        """Return row weights (K,): one for the first `count` rows, zero for the others."""
        return (torch.arange(most, device=count.device) < count).to(self.dtype)


class FTMLHindsight(FTML):
    """The comparator for regret: `FTML` with weights meta-learned on the whole stream in advance.

    Along the stream the weights are constant, and each task adapts them to its rows so far. Finn
    et al. (2019, eq. 2) define regret against the best weights; these approximate them.

    Args:
        meta_updates: Updates of the weights before the stream begins.
        **options: Options of `FTML`.

    Raises:
        ValueError: The memory is smaller than the number of tasks of a stream.
    """

    def __init__(self, setup: LearnerSetup, *, meta_updates: int = 5000, **options: Any) -> None:
        super().__init__(setup, meta_updates=meta_updates, **options)
        assert self.spec.streams is not None
        tasks = max(stream.num_tasks for stream in self.spec.streams.values())
        if self.memory < tasks:
            raise ValueError(
                f"algo.memory={self.memory}: expected {tasks} or more, the tasks of the stream"
            )

    def train_in_hindsight(
        self, state: State, x: Tensor, y: Tensor, stream: Stream
    ) -> Iterator[State]:
        known = state
        for number in range(stream.num_steps):
            step = Step(number, number * stream.rows, stream.task(number), begins_visit=False)
            here = slice(step.rows, step.rows + stream.rows)
            known = self.observe(known, x[:, here], y[:, here], step)
        for update in range(self.meta_updates):
            known = self._each(self._updated(update), known)
            yield {n: known[n] if n.startswith("weights.") else v for n, v in state.items()}

    def learn(
        self,
        net: nn.Module,  # noqa: ARG002
        theta: Params,  # noqa: ARG002
        state: State,
        x: Tensor,
        y: Tensor,
        step: Step,
    ) -> State:
        return self._keep(state, x, y, step)

    def _updated(self, update: int) -> Any:
        """Return the meta-update of this number, as a function of the state of one rollout."""

        def one(net: nn.Module, theta: Params, own: State) -> State:  # noqa: ARG001
            return self._meta_update(net, own, Step(0, 0, None, begins_visit=False), update)

        return one
