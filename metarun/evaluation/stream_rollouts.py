"""Lifetimes: a learner lives along trajectories, judged on each step before it learns from it.

What is measured is kept step by step, so that a killed lifetime goes on exactly where it was.
Shapes: T lifetimes, K steps, V visits to tasks, J tasks, S rows of a stream, Q held-out rows of
a task, D outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from metarun.algorithms.base import task_metric
from metarun.algorithms.common.online import OnlineLearner
from metarun.algorithms.common.update_strategies import Step
from metarun.core import seeding
from metarun.core.types import Stream, TaskBatch

MEASURED = ("incoming", "incoming_loss", "current", "matrix")
"""What is kept of a lifetime, by name; see `Lifetimes.measured`."""


class Lifetimes:
    """T lifetimes side by side.

    Args:
        algorithm: Who lives; its parameters stay as they are.
        batch: The trajectories and their held-out rows.
        stream: Their layout.
        follow: Also measure after every step, and after every visit, what is not asked for at
            the end: all but `final` and the last row of the matrix. It takes most of the time.

    Attributes:
        step: Steps lived through.
        state: What the learner has become, (T, …) tensors by name.
    """

    def __init__(
        self, algorithm: OnlineLearner, batch: TaskBatch, stream: Stream, *, follow: bool = True
    ) -> None:
        self._algorithm = algorithm
        self._batch = batch
        self._stream = stream
        self._follow = follow
        self._y = batch.support_y
        self._held_y = batch.query_y.unflatten(1, (stream.num_tasks, stream.queries))
        with torch.no_grad():
            self._x = algorithm.perceive(batch.support_x)
            held_x = algorithm.perceive(batch.query_x)
            self._held_x = held_x.unflatten(1, (stream.num_tasks, stream.queries))
            self.state = algorithm.start(self._x, self._y)
        self.step = 0
        self._begun = False
        self._kept: dict[str, list[Tensor]] = {name: [] for name in MEASURED}

    @property
    def finished(self) -> bool:
        return self.step >= self._stream.num_steps

    @torch.no_grad()
    def begin(self, tick: Callable[[], None] | None = None) -> None:
        """Get ready for the first step, once.

        Args:
            tick: Called now and then; may raise to stop, after which it begins anew.
        """
        if self._begun:
            return
        after = self.state
        for after in self._algorithm.foresee(self.state, self._x, self._y, self._stream):  # noqa: B007
            if tick is not None:
                tick()
        self.state, self._begun = after, True

    @torch.no_grad()
    def advance(self) -> None:
        """Be judged on the next step, then learn from it."""
        self.begin()
        stream, number = self._stream, self.step
        told = stream.task(number) if stream.told else None
        begins = number % stream.steps == 0
        here = slice(number * stream.rows, (number + 1) * stream.rows)
        x, y = self._x[:, here], self._y[:, here]
        # An algorithm that draws from torch's generator resumes like any other.
        seeding.seed_torch(seeding.key("lifetime", number))
        if self._follow:
            if number == 0:
                self._kept["matrix"].append(self._row())
            outputs = self._algorithm.answers(self.state, x, told)
            self._keep("incoming", task_metric(self._algorithm.spec, outputs, y))
            self._keep("incoming_loss", self._loss(outputs, y))
        step = Step(number, here.start, told, begins and stream.told)
        self.state = self._algorithm.observe(self.state, x, y, step)
        self.step += 1
        if self._follow:
            task = stream.task(number)
            outputs = self._algorithm.answers(self.state, self._held_x[:, task], told)
            score = task_metric(self._algorithm.spec, outputs, self._held_y[:, task])
            self._keep("current", score)
        if (self._follow and self.step % stream.steps == 0) or self.finished:
            self._kept["matrix"].append(self._row())

    def measured(self) -> dict[str, Tensor]:
        """What has been measured so far, in float64.

        `incoming` (T, K) and `incoming_loss` (T, K): the metric and the mean loss of the rows of
        each step, before it was learned from; `current` (T, K): the metric on the held-out rows
        of the step's task after it; `matrix` (T, V + 1, J): the metric on the held-out rows of
        each task before the first visit and after each.
        """
        return {name: torch.stack(kept, 1) for name, kept in self._kept.items() if kept}

    def final(self) -> Tensor:
        """(T,) the metric over all held-out rows at the end; tasks have equally many."""
        return self._kept["matrix"][-1].mean(-1)

    def untaught(self) -> Tensor:
        """(T, J) the metric of networks that were drawn anew and learned nothing."""
        outputs = self._algorithm.untaught(self._batch.query_x)
        return self._scores(outputs.unflatten(1, self._held_y.shape[1:3]))

    def save(self) -> dict[str, Any]:
        """All that a later `restore` needs."""
        return {
            "step": self.step,
            "state": self.state,
            "kept": self._kept,
            "begun": self._begun,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on where lifetimes with the same trajectories were saved."""
        device = self._x.device
        self.step, self._begun = saved["step"], saved["begun"]
        self.state = {name: value.to(device) for name, value in saved["state"].items()}
        self._kept = {
            name: [value.to(device) for value in values] for name, values in saved["kept"].items()
        }

    def _keep(self, name: str, values: Tensor) -> None:
        self._kept[name].append(values.double())

    def _row(self) -> Tensor:
        """(T, J) the metric on each task's held-out rows as things stand."""
        learner, num_tasks = self._algorithm, self._stream.num_tasks
        if self._stream.told and learner.asks_for_tasks:
            return self._scores(learner.answers_of_tasks(self.state, self._held_x))
        outputs = learner.answers(self.state, self._held_x.flatten(1, 2), None)
        return self._scores(outputs.unflatten(1, (num_tasks, -1)))

    def _scores(self, outputs: Tensor) -> Tensor:
        return task_metric(self._algorithm.spec, outputs.double(), self._held_y)

    def _loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = [self._algorithm.loss(*pair) for pair in zip(outputs, targets, strict=True)]
        return torch.stack(losses)
